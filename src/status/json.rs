//! A status as JSON.

use std::fmt::Write as _;

use super::{ShardStatus, Status};
use crate::protocol::{Reason, Refusal};
use crate::wal::{ScrubStatus, unix_ms};

impl Status {
    /// As JSON, one object.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut json = String::new();
        let now_ms = unix_ms();
        let _ = write!(
            json,
            "{{\"role\":\"{}\",\"cluster\":\"{}\",\"node\":{},\"region\":{},\"epoch\":{},\"uptime_ms\":{},\"shards\":[",
            self.role.as_str(),
            self.cluster,
            self.node,
            self.region,
            self.epoch,
            self.uptime.as_millis()
        );
        for (index, shard) in self.shards.iter().enumerate() {
            json.push_str(if index == 0 { "" } else { "," });
            shard.write_json(&mut json, now_ms);
        }
        json.push_str("]}");
        json
    }
}

impl ShardStatus {
    fn write_json(&self, json: &mut String, now_ms: u64) {
        let _ = write!(
            json,
            "{{\"shard\":{},\"tail\":{},\"head\":{},\"head_epoch\":{},\"synced\":{},\"committed\":{},\"retained_bytes\":{},\
             \"max_wal_bytes\":{},\"mode\":{},\"reason\":{},\"poison\":{}",
            self.shard,
            self.tail,
            self.head,
            self.head_epoch,
            self.synced,
            self.committed,
            self.retained_bytes,
            self.max_wal_bytes.map_or_else(|| "null".to_owned(), |bytes| bytes.to_string()),
            json_text(self.mode.as_str()),
            json_option(self.reason.map(Reason::as_str)),
            json_option(self.poison.as_deref())
        );
        if let Some(following) = &self.following {
            let _ = write!(
                json,
                ",\"following\":{{\"connected\":{},\"leader_head\":{},\"applied\":{},\"lag_records\":{},\"heard_ms_ago\":{},\"rebuilding\":{},\"error\":{}}}",
                following.connected,
                following.leader_head,
                following.applied,
                following.leader_head.records_since(self.head),
                json_ago(following.heard_at_ms, now_ms),
                following.rebuilding,
                json_option(following.error.as_deref())
            );
        }
        json.push_str(",\"pins\":[");
        for (index, pin) in self.pins.iter().enumerate() {
            let _ = write!(
                json,
                "{}{{\"owner\":{},\"reason\":{},\"lsn\":{},\"lost\":{}}}",
                if index == 0 { "" } else { "," },
                json_text(&pin.owner),
                json_text(&pin.reason),
                pin.lsn,
                pin.lost
            );
        }
        json.push_str("],\"followers\":[");
        for (index, follower) in self.followers.iter().enumerate() {
            let _ = write!(
                json,
                "{}{{\"node\":{},\"state\":\"{}\",\"shipped\":{},\"received\":{},\"durable\":{},\"applied\":{},\
                 \"lag_records\":{},\"lag_bytes\":{},\"acked_ms_ago\":{},\"mode\":{},\"reason\":{},\"refusal\":{},\
                 \"place_lost\":{},\"divergence\":{},\"session\":",
                if index == 0 { "" } else { "," },
                follower.node,
                follower.state(self.head),
                follower.shipped,
                follower.received,
                follower.durable,
                follower.applied,
                self.head.records_since(follower.received),
                follower.lag_bytes,
                json_ago(follower.acked_at_ms, now_ms),
                json_text(follower.mode.as_str()),
                json_option(follower.reason.map(Reason::as_str)),
                json_option(follower.refusal.map(Refusal::as_str)),
                follower.place_lost,
                json_option(follower.divergence.as_deref())
            );
            let _ = match &follower.session {
                None => write!(json, "null}}"),
                Some(session) => write!(
                    json,
                    "{{\"id\":{},\"kind\":\"{}\",\"phase\":\"{}\",\"target\":{},\"achieved\":{},\"base_blocks\":{}}}}}",
                    session.id,
                    session.kind,
                    session.phase,
                    session.target,
                    session.progress.achieved,
                    session.progress.base_blocks
                ),
            };
        }
        json.push(']');
        write_scrub_json(&self.scrub, json, now_ms);
        json.push('}');
    }
}

fn write_scrub_json(scrub: &ScrubStatus, json: &mut String, now_ms: u64) {
    let _ = write!(
        json,
        ",\"scrub\":{{\"passes\":{},\"completed_ms_ago\":{},\"bytes\":{},\"findings\":[",
        scrub.passes,
        json_ago(scrub.completed_at_ms, now_ms),
        scrub.bytes
    );
    for (index, finding) in scrub.findings.iter().enumerate() {
        let _ = write!(
            json,
            "{}{{\"path\":{},\"offset\":{},\"end\":{},\"lsn\":{},\"reason\":{}}}",
            if index == 0 { "" } else { "," },
            json_text(&finding.path.display().to_string()),
            finding.offset,
            finding.end,
            finding.lsn,
            json_text(&finding.reason)
        );
    }
    json.push_str("]}");
}

fn json_ago(at_ms: u64, now_ms: u64) -> String {
    if at_ms == 0 { "null".to_owned() } else { now_ms.saturating_sub(at_ms).to_string() }
}

/// A JSON string, or `null`.
fn json_option(text: Option<&str>) -> String {
    text.map_or_else(|| "null".to_owned(), json_text)
}

/// A text as a JSON string, quotes included.
///
/// ```
/// assert_eq!(towline::status::json_text("a \"b\"\n"), r#""a \"b\"\u000a""#);
/// ```
#[must_use]
pub fn json_text(text: &str) -> String {
    let mut json = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => {
                json.push('\\');
                json.push(character);
            }
            control if control < ' ' => {
                let _ = write!(json, "\\u{:04x}", u32::from(control));
            }
            other => json.push(other),
        }
    }
    json.push('"');
    json
}

//! The protocol engine stays pure: its sources are read here, and using a clock, I/O, threads, locks, randomness,
//! hidden order or another part of the crate fails the test.

// A test may panic, also in the functions that it is made of.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

/// What of the standard library, and of the crate, the engine may name after `std::` and `crate::`. `super::` stays
/// within the engine, because its sources lie in one directory.
const ALLOWED_STD: [&str; 8] = ["cmp", "error", "fmt", "iter", "mem", "num", "ops", "str"];
const ALLOWED_CRATE: [&str; 4] = ["types", "limits", "error", "protocol"];

/// Words that have no place there, whichever way they were imported.
const FORBIDDEN: [&str; 22] = [
    "Instant",
    "SystemTime",
    "HashMap",
    "HashSet",
    "RandomState",
    "Mutex",
    "RwLock",
    "Atomic",
    "Arc",
    "Cell",
    "RefCell",
    "unsafe",
    "static",
    "thread_local",
    "rand",
    "parking_lot",
    "crossbeam_channel",
    "memmap2",
    "socket2",
    "crc32fast",
    "println",
    "eprintln",
];

#[test]
fn the_protocol_engine_is_pure() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/protocol");
    let mut files = Vec::new();
    collect(&directory, &mut files);
    assert!(files.len() >= 8, "{} sources found in {}", files.len(), directory.display());
    let mut violations = Vec::new();
    for file in files {
        let source = std::fs::read_to_string(&file).unwrap();
        for (line, what) in impurities(&source) {
            violations.push(format!("{}:{line}: {what}", file.display()));
        }
    }
    assert!(violations.is_empty(), "src/protocol is to be pure:\n{}", violations.join("\n"));
}

#[test]
fn impurities_are_found() {
    let impure = [
        "use std::fs::File;",
        "use std::time::Duration;",
        "let now = std::time::Instant::now();",
        "use std::{fmt, net::TcpStream};",
        "use std::{\n    fmt,\n    thread,\n};",
        "use std::sync::Arc;",
        "use std::collections::HashMap;",
        "use crate::wal::Wal;",
        "use crate::{types::Lsn, wal::Wal};",
        "use crate::Lsn;",
        "fn f() { crate::node::start() }",
        "use super::super::wal;",
        "use rand::Rng;",
        "use proptest::prelude::*;",
        "use log::debug;",
        "static COUNT: u64 = 0;",
        "unsafe { nothing() }",
        "println!(\"x\");",
    ];
    for source in impure {
        assert_ne!(impurities(source), [], "{source}");
    }
}

#[test]
fn purity_is_not_mistaken_for_impurity() {
    let pure = "//! No std::fs here.\nuse std::fmt;\nuse std::{fmt, str::FromStr};\nuse crate::types::{Lsn, NodeId};\n\
                use super::event::Event;\n/// Never an Instant.\nlet text: &'static str = \"\"; // not std::net\n\
                #[cfg(test)]\nmod tests {\n    use proptest::prelude::*;\n}\n";
    assert_eq!(impurities(pure), []);
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Line numbers and what is wrong there. Comments do not count; after `#[cfg(test)]` other crates may be used, which
/// tests need, and nothing else.
fn impurities(source: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut tests = source.starts_with("//! Tests");
    let mut statement = String::new();
    for (index, line) in source.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("").replace("&'static", "&");
        tests |= code.contains("#[cfg(test)]");
        for word in words(&code) {
            if FORBIDDEN
                .iter()
                .any(|forbidden| word == *forbidden || (*forbidden == "Atomic" && word.starts_with("Atomic")))
            {
                found.push((index + 1, format!("{word} has no place here")));
            }
        }
        // A `use` may go over several lines; anything else is judged line by line.
        statement += &code;
        if statement.trim_start().starts_with("use ") && !statement.contains(';') {
            continue;
        }
        found.extend(paths(&statement, tests).into_iter().map(|what| (index + 1, what)));
        statement.clear();
    }
    found
}

fn paths(statement: &str, tests: bool) -> Vec<String> {
    let mut found = Vec::new();
    for (root, allowed) in [("std::", &ALLOWED_STD[..]), ("core::", &ALLOWED_STD[..]), ("crate::", &ALLOWED_CRATE[..])]
    {
        for (at, _) in statement.match_indices(root) {
            let within_a_name = statement[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_');
            if within_a_name {
                continue;
            }
            for name in first_names(&statement[at + root.len()..]) {
                if !allowed.contains(&name.as_str()) {
                    found.push(format!("{root}{name} is not among {allowed:?}"));
                }
            }
        }
    }
    if statement.contains("super::super") {
        found.push("super::super may leave the engine".to_owned());
    }
    if let Some(path) = statement.trim_start().strip_prefix("use ") {
        let root = words(path).next().unwrap_or_default();
        if !tests && !["std", "core", "crate", "self", "super"].contains(&root) && !root.starts_with(char::is_uppercase)
        {
            found.push(format!("{root} is another crate"));
        }
    }
    found
}

/// The names that directly follow a root: one, or those at the top level of a brace group.
fn first_names(rest: &str) -> Vec<String> {
    let Some(group) = rest.strip_prefix('{') else {
        return words(rest).next().map(str::to_owned).into_iter().collect();
    };
    let mut names = Vec::new();
    let (mut depth, mut item) = (0, String::new());
    for letter in group.chars() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(std::mem::take(&mut item)),
            _ if depth == 0 => item.push(letter),
            _ => {}
        }
    }
    names.push(item);
    names.iter().filter_map(|item| words(item).next().map(str::to_owned)).collect()
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|letter: char| !letter.is_alphanumeric() && letter != '_').filter(|word| !word.is_empty())
}

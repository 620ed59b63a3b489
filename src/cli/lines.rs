//! What a line of keys and values says.

use std::str::FromStr;

/// Longest key and longest value, in bytes, as in `16:64`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) key_len: u32,
    pub(super) value_len: u32,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Shape, String> {
        let parts = text.split_once(':').map(|(key, value)| (key.parse(), value.parse()));
        let Some((Ok(key_len), Ok(value_len))) = parts else {
            return Err(
                "two numbers of bytes are needed, as in 16:64: the longest key and the longest value".to_owned()
            );
        };
        Ok(Shape { key_len, value_len })
    }
}

impl Shape {
    /// What is wrong with a line, if anything, for a store of this shape.
    pub(super) fn check(self, line: &[u8]) -> Result<(), String> {
        let (key, value) = split(line);
        if key.is_empty() {
            return Err("its key is empty".to_owned());
        }
        for (what, len, most) in
            [("key", key.len(), self.key_len), ("value", value.map_or(0, <[u8]>::len), self.value_len)]
        {
            if len as u64 > u64::from(most) {
                return Err(format!("its {what} has {len} bytes or more, and may have {most}"));
            }
        }
        Ok(())
    }

    /// Bytes of the longest line that can be right.
    pub(super) fn longest(self) -> usize {
        usize::try_from(u64::from(self.key_len) + 1 + u64::from(self.value_len)).unwrap_or(usize::MAX)
    }
}

/// The key, and the value unless the line deletes the key.
pub(super) fn split(line: &[u8]) -> (&[u8], Option<&[u8]>) {
    match line.iter().position(|&byte| byte == b'\t') {
        Some(tab) => (&line[..tab], Some(&line[tab + 1..])),
        None => (line, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_is_two_numbers() {
        assert!(matches!("16:64".parse(), Ok(Shape { key_len: 16, value_len: 64 })));
        for text in ["", "16", "16:", ":64", "16:64:1", "a:b", "-1:2", "5000000000:1"] {
            assert!(text.parse::<Shape>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_line_is_split_at_its_first_tab() {
        assert_eq!(split(b"k\tv"), (&b"k"[..], Some(&b"v"[..])));
        assert_eq!(split(b"k\t\t"), (&b"k"[..], Some(&b"\t"[..])));
        assert_eq!(split(b"k\t"), (&b"k"[..], Some(&b""[..])));
        assert_eq!(split(b"k"), (&b"k"[..], None));
        assert_eq!(split(b""), (&b""[..], None));
    }

    #[test]
    fn a_line_that_is_right_is_no_longer_than_the_longest() {
        let shape = Shape { key_len: 2, value_len: 3 };
        for (line, right) in
            [("ab\tcde", true), ("ab", true), ("a\t", true), ("abc\td", false), ("ab\tcdef", false), ("\tv", false)]
        {
            assert_eq!(shape.check(line.as_bytes()).is_ok(), right, "{line:?}");
            assert!(!right || line.len() <= shape.longest());
        }
        assert!(Shape { key_len: u32::MAX, value_len: u32::MAX }.longest() > 0);
    }
}

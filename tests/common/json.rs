//! As much of JSON as it takes to check what the command line prints: a strict reader, without escapes beyond those
//! that the tests meet.

use std::collections::BTreeMap;
use std::ops::Index;

#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Json>),
    Object(BTreeMap<String, Json>),
}

impl Json {
    /// Reads one value, which must be all there is.
    pub fn parse(text: &str) -> Json {
        let mut reader = Reader { bytes: text.as_bytes(), at: 0 };
        let value = reader.value();
        reader.blanks();
        assert_eq!(reader.at, text.len(), "more behind the value: {text}");
        value
    }

    pub fn number(&self) -> f64 {
        let Json::Number(number) = self else { panic!("{self:?} is not a number") };
        *number
    }

    pub fn text(&self) -> &str {
        let Json::Text(text) = self else { panic!("{self:?} is not a text") };
        text
    }

    pub fn list(&self) -> &[Json] {
        let Json::List(list) = self else { panic!("{self:?} is not a list") };
        list
    }

    pub fn keys(&self) -> Vec<&str> {
        let Json::Object(fields) = self else { panic!("{self:?} is not an object") };
        fields.keys().map(String::as_str).collect()
    }
}

impl Index<&str> for Json {
    type Output = Json;

    fn index(&self, key: &str) -> &Json {
        let Json::Object(fields) = self else { panic!("{self:?} is not an object") };
        fields.get(key).unwrap_or_else(|| panic!("no {key:?} in {fields:?}"))
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn blanks(&mut self) {
        while self.bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
    }

    fn peek(&mut self) -> u8 {
        self.blanks();
        *self.bytes.get(self.at).expect("the text ends early")
    }

    fn take(&mut self, expected: &str) {
        self.blanks();
        assert!(self.bytes[self.at..].starts_with(expected.as_bytes()), "{expected:?} is due at {}", self.at);
        self.at += expected.len();
    }

    fn value(&mut self) -> Json {
        match self.peek() {
            b'{' => self.object(),
            b'[' => self.list(),
            b'"' => Json::Text(self.text()),
            b't' => {
                self.take("true");
                Json::Bool(true)
            }
            b'f' => {
                self.take("false");
                Json::Bool(false)
            }
            b'n' => {
                self.take("null");
                Json::Null
            }
            _ => self.number(),
        }
    }

    fn object(&mut self) -> Json {
        let mut fields = BTreeMap::new();
        self.take("{");
        while self.peek() != b'}' {
            let key = self.text();
            self.take(":");
            let value = self.value();
            assert!(fields.insert(key.clone(), value).is_none(), "{key:?} twice");
            if self.peek() != b'}' {
                self.take(",");
                assert_ne!(self.peek(), b'}', "a comma too many");
            }
        }
        self.take("}");
        Json::Object(fields)
    }

    fn list(&mut self) -> Json {
        let mut list = Vec::new();
        self.take("[");
        while self.peek() != b']' {
            list.push(self.value());
            if self.peek() != b']' {
                self.take(",");
                assert_ne!(self.peek(), b']', "a comma too many");
            }
        }
        self.take("]");
        Json::List(list)
    }

    fn text(&mut self) -> String {
        self.take("\"");
        let mut bytes = Vec::new();
        loop {
            let byte = self.bytes[self.at];
            self.at += 1;
            match byte {
                b'"' => return String::from_utf8(bytes).expect("text is UTF-8"),
                b'\\' => {
                    let escaped = self.bytes[self.at];
                    self.at += 1;
                    match escaped {
                        b'n' => bytes.push(b'\n'),
                        b't' => bytes.push(b'\t'),
                        b'r' => bytes.push(b'\r'),
                        b'"' | b'\\' | b'/' => bytes.push(escaped),
                        b'u' => {
                            let digits = std::str::from_utf8(&self.bytes[self.at..self.at + 4]).unwrap();
                            let code = u32::from_str_radix(digits, 16).expect("four hexadecimal digits");
                            let character = char::from_u32(code).expect("a character");
                            bytes.extend(character.to_string().bytes());
                            self.at += 4;
                        }
                        other => panic!("unknown escape {other}"),
                    }
                }
                control if control < 0x20 => panic!("a control character stands in a text"),
                other => bytes.push(other),
            }
        }
    }

    fn number(&mut self) -> Json {
        let start = self.at;
        while self.bytes.get(self.at).is_some_and(|byte| byte.is_ascii_digit() || b"+-.eE".contains(byte)) {
            self.at += 1;
        }
        let text = std::str::from_utf8(&self.bytes[start..self.at]).unwrap();
        Json::Number(text.parse().unwrap_or_else(|_| panic!("{text:?} is not a number")))
    }
}

//! `key=value,key=value` lists: one table a flag, from which come the parser, its errors and the help text.

use std::fmt::Write;

use crate::exit::{Failure, usage};

/// What happens where a key is not given.
#[derive(Clone, Copy, Debug)]
pub enum Missing {
    /// This value is used.
    Default(&'static str),
    /// Nothing is set; the text says what that means.
    Unset(&'static str),
    /// It is an error.
    Required,
}

/// One key of a list.
#[derive(Debug)]
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What its value looks like.
    pub form: &'static str,
    /// What happens where it is not given.
    pub missing: Missing,
    /// What it means.
    pub help: &'static str,
}

/// A flag that takes a list.
#[derive(Debug)]
pub struct KeyList {
    /// With its dashes.
    pub flag: &'static str,
    /// All its keys.
    pub keys: &'static [Key],
}

/// Where whatever is a back-end meets its front-end.
pub const FRONT_END_SOCKET: Key = Key {
    name: "socket",
    form: "PATH",
    missing: Missing::Required,
    help: "Unix socket to the vhost-user front-end",
};

/// Who makes that socket.
pub const FRONT_END_LISTEN: Key = Key {
    name: "listen",
    form: "on|off",
    missing: Missing::Default("on"),
    help: "on: wait for the front-end here; off: connect to it, as soon as it is there",
};

/// The values of a parsed list, defaults not filled in.
#[derive(Debug)]
pub struct Values {
    list: &'static KeyList,
    given: Vec<Option<String>>,
}

impl KeyList {
    fn names(&self) -> String {
        let names: Vec<&str> = self.keys.iter().map(|key| key.name).collect();
        names.join(", ")
    }

    fn position(&self, name: &str) -> Result<usize, Failure> {
        self.keys
            .iter()
            .position(|key| key.name == name)
            .ok_or_else(|| {
                usage(format!(
                    "{}: unknown key '{name}'; the keys are {}",
                    self.flag,
                    self.names()
                ))
            })
    }

    /// Reads a list. An empty text is an empty list.
    pub fn parse(&'static self, text: &str) -> Result<Values, Failure> {
        let flag = self.flag;
        let mut given: Vec<Option<String>> = self.keys.iter().map(|_| None).collect();
        for item in text.split(',').filter(|_| !text.is_empty()) {
            let Some((name, value)) = item.split_once('=') else {
                return Err(usage(format!(
                    "{flag}: '{item}' is not key=value; the keys are {}",
                    self.names()
                )));
            };
            let slot = &mut given[self.position(name)?];
            if value.is_empty() {
                return Err(usage(format!("{flag}: {name}= has no value")));
            }
            if slot.replace(value.to_owned()).is_some() {
                return Err(usage(format!("{flag}: the key '{name}' is given twice")));
            }
        }
        for (key, value) in self.keys.iter().zip(&given) {
            if matches!(key.missing, Missing::Required) && value.is_none() {
                return Err(usage(format!(
                    "{flag}: the key '{}' is missing ({}={}); the keys are {}",
                    key.name,
                    key.name,
                    key.form,
                    self.names()
                )));
            }
        }
        Ok(Values { list: self, given })
    }

    /// Help: the text, then a line for each key with its default.
    pub fn help(&self, intro: &str) -> String {
        let mut text = format!("{intro}\n");
        let forms: Vec<String> = self
            .keys
            .iter()
            .map(|key| format!("{}={}", key.name, key.form))
            .collect();
        let width = forms.iter().map(String::len).max().unwrap_or(0);
        for (key, form) in self.keys.iter().zip(&forms) {
            let missing = match key.missing {
                Missing::Default(value) => format!("[default: {value}]"),
                Missing::Unset(meaning) => format!("[default: {meaning}]"),
                Missing::Required => "[required]".to_owned(),
            };
            // Writing to a string does not fail.
            let _ = write!(text, "\n  {form:<width$}  {} {missing}", key.help);
        }
        text
    }
}

impl Values {
    /// The value of a key, or of its default, as `parse` reads it.
    pub fn get<T>(
        &self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, Failure> {
        let position = self.list.position(name)?;
        let default = match self.list.keys[position].missing {
            Missing::Default(value) => Some(value),
            Missing::Unset(_) | Missing::Required => None,
        };
        let Some(text) = self.given[position].as_deref().or(default) else {
            return Ok(None);
        };
        parse(text)
            .map(Some)
            .map_err(|why| usage(format!("{}: {name}={text}: {why}", self.list.flag)))
    }

    /// The value of a key that is required or has a default.
    pub fn need<T>(
        &self,
        name: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, Failure> {
        self.get(name, parse)?
            .ok_or_else(|| usage(format!("{}: the key '{name}' is missing", self.list.flag)))
    }
}

/// `on` or `off`.
pub fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("it is on or off".to_owned()),
    }
}

/// A number within a range.
pub fn number<T>(range: std::ops::RangeInclusive<T>) -> impl FnOnce(&str) -> Result<T, String>
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display,
{
    move |text| match text.parse() {
        Ok(value) if range.contains(&value) => Ok(value),
        _ => Err(format!(
            "it is a number from {} to {}",
            range.start(),
            range.end()
        )),
    }
}

/// A size in bytes, with K, M, G or T for powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let why = || "it is a number of bytes, or one with K, M, G or T behind it".to_owned();
    let (digits, shift) = match text.as_bytes().last().map(u8::to_ascii_uppercase) {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    // `parse` alone would take a sign.
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(why());
    }
    let value: u64 = digits.parse().map_err(|_| why())?;
    value
        .checked_mul(1 << shift)
        .ok_or_else(|| "it is more than 64 bits can hold".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    static LIST: KeyList = KeyList {
        flag: "--thing",
        keys: &[
            Key {
                name: "size",
                form: "SIZE",
                missing: Missing::Default("256M"),
                help: "how large",
            },
            Key {
                name: "socket",
                form: "PATH",
                missing: Missing::Required,
                help: "where",
            },
            Key {
                name: "core",
                form: "N",
                missing: Missing::Unset("any"),
                help: "which",
            },
        ],
    };

    fn error(text: &str) -> String {
        LIST.parse(text).unwrap_err().to_string()
    }

    #[test]
    fn values_and_defaults_are_found() {
        let values = LIST.parse("socket=/a=b,core=3").unwrap();
        assert_eq!(values.need("size", size).unwrap(), 256 << 20);
        let path = values.need("socket", |text| Ok(text.to_owned())).unwrap();
        assert_eq!(path, "/a=b");
        assert_eq!(values.get("core", number(0..=7)).unwrap(), Some(3));
        let values = LIST.parse("socket=x").unwrap();
        assert_eq!(values.get("core", number(0..=7)).unwrap(), None);
    }

    #[test]
    fn each_error_is_one_line_that_names_flag_and_key() {
        let cases = [
            ("sokcet=x", "sokcet"),
            ("socket", "socket"),
            ("socket=", "socket"),
            ("socket=a,socket=b", "socket"),
            ("size=1", "socket"),
            ("", "socket"),
            ("socket=a,", "''"),
        ];
        for (text, key) in cases {
            let error = error(text);
            assert!(error.starts_with("--thing: "), "{error}");
            assert!(error.contains(key), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
        assert!(error("sokcet=x").ends_with("the keys are size, socket, core"));
        let values = LIST.parse("socket=x,core=9").unwrap();
        let error = values.get("core", number(0..=7)).unwrap_err().to_string();
        assert_eq!(error, "--thing: core=9: it is a number from 0 to 7");
    }

    #[test]
    fn sizes_take_suffixes_and_refuse_what_is_none() {
        assert_eq!(size("0"), Ok(0));
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("3k"), Ok(3 << 10));
        assert_eq!(size("256M"), Ok(256 << 20));
        assert_eq!(size("64G"), Ok(64 << 30));
        assert_eq!(size("2T"), Ok(2 << 40));
        for text in ["", "M", "-1", "+1", "1.5G", "12Q", "G1", "1 M", "1Mé"] {
            assert!(size(text).is_err(), "{text}");
        }
        assert!(size("99999999T").unwrap_err().contains("64 bits"));
    }

    #[test]
    fn the_help_names_every_key_and_its_default() {
        let help = LIST.help("A thing");
        for part in [
            "size=SIZE",
            "[default: 256M]",
            "socket=PATH",
            "[required]",
            "[default: any]",
        ] {
            assert!(help.contains(part), "{help}");
        }
    }
}

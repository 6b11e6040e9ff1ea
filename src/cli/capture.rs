//! `--capture` of `run` and `pair`: frames that the built-in guest records, and the files that they go to.

use std::ffi::OsString;

use bare_metal::capture::{MAX_FRAMES, MAX_SNAPLEN};
use vmm::CaptureConfig;

use super::keys::{Key, KeyList, Missing, Values, number};
use crate::exit::{Failure, usage};

/// Memory that a guest has for it at most.
const MEMORY: u64 = 64 << 20;

const FRAMES: Key = Key {
    name: "frames",
    form: "N",
    missing: Missing::Default("1000"),
    help: "how many of each workload, from its first on, 1 to 65536; as many in the file",
};
const SNAPLEN: Key = Key {
    name: "snaplen",
    form: "BYTES",
    missing: Missing::Default("1518"),
    help: "how much is kept of each, 1 to 16384",
};

/// The keys behind FILE, for one VM.
pub static CAPTURE: KeyList = KeyList {
    flag: "--capture",
    keys: &[FRAMES, SNAPLEN],
};

/// The keys for two VMs.
pub static BOTH: KeyList = KeyList {
    flag: "--capture",
    keys: &[
        Key {
            name: "back",
            form: "FILE",
            missing: Missing::Unset("none"),
            help: "for the frames of the back-end",
        },
        Key {
            name: "front",
            form: "FILE",
            missing: Missing::Unset("none"),
            help: "for those of the front-end",
        },
        FRAMES,
        SNAPLEN,
    ],
};

fn limits(values: &Values) -> Result<[u32; 2], Failure> {
    let most = |most: usize| number(1..=u32::try_from(most).unwrap_or(u32::MAX));
    let frames = values.need("frames", most(MAX_FRAMES))?;
    let snaplen = values.need("snaplen", most(MAX_SNAPLEN))?;
    if u64::from(frames) * u64::from(snaplen) > MEMORY {
        return Err(usage(format!(
            "--capture: frames={frames} of snaplen={snaplen} bytes: the guest has 64M for them"
        )));
    }
    Ok([frames, snaplen])
}

/// Reads what `run` is given, for the interface of this name.
pub fn parse(text: &str, interface: &'static str) -> Result<CaptureConfig, Failure> {
    let (path, keys) = text.split_once(',').unwrap_or((text, ""));
    let [frames, snaplen] = limits(&CAPTURE.parse(keys)?)?;
    if path.is_empty() {
        return Err(usage("--capture: there has to be FILE"));
    }
    Ok(CaptureConfig {
        path: path.into(),
        interface,
        frames,
        snaplen,
    })
}

/// What the guest's command line says of it.
pub fn guest_words(config: &CaptureConfig) -> String {
    format!(" capture={} snaplen={}", config.frames, config.snaplen)
}

/// The flags of `run` that do what `pair` is given, back-end first.
pub fn run_flags(text: &str) -> Result<[Option<OsString>; 2], Failure> {
    let values = BOTH.parse(text)?;
    let [frames, snaplen] = limits(&values)?;
    let file = |name| values.get(name, |path| Ok(path.to_owned()));
    let files = [file("back")?, file("front")?];
    if files == [None, None] {
        return Err(usage("--capture: there has to be back=FILE or front=FILE"));
    }
    let flag = |path| format!("--capture={path},frames={frames},snaplen={snaplen}").into();
    Ok(files.map(|path| path.map(flag)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bare_metal::capture::Limits;

    #[test]
    fn what_pair_is_given_is_what_run_takes() {
        let [back, front] = run_flags("front=/f g,back=b,frames=9,snaplen=96").unwrap();
        for (flag, path) in [(back, "b"), (front, "/f g")] {
            let flag = flag.unwrap().into_string().unwrap();
            let text = flag.strip_prefix("--capture=").unwrap();
            let config = parse(text, "x").unwrap();
            assert_eq!(config.path, std::path::Path::new(path));
            assert_eq!((config.frames, config.snaplen), (9, 96));
        }
        let [back, front] = run_flags("front=f").unwrap();
        assert_eq!(back, None);
        assert_eq!(front.unwrap(), "--capture=f,frames=1000,snaplen=1518");
    }

    #[test]
    fn the_guest_understands_its_words() {
        let config = parse("f,frames=65536,snaplen=1000", "x").unwrap();
        let words = guest_words(&config);
        let boot = bare_metal::command::Boot::parse(&words, |word| panic!("{word}"));
        let Limits { frames, snaplen } = boot.capture;
        assert_eq!((frames, snaplen), (65536, 1000));
        let usual = parse("f", "x").unwrap();
        assert_eq!(usual.snaplen as usize, Limits::default().snaplen);
    }

    #[test]
    fn each_bad_value_is_named() {
        let one = |text: &str| parse(text, "x").unwrap_err().to_string();
        let both = |text: &str| run_flags(text).unwrap_err().to_string();
        for (error, part) in [
            (one(""), "there has to be FILE"),
            (one(",frames=1"), "there has to be FILE"),
            (
                one("f,frames=0"),
                "frames=0: it is a number from 1 to 65536",
            ),
            (one("f,snaplen=16385"), "snaplen=16385: it is a number from"),
            (one("f,frames=65536"), "the guest has 64M"),
            (one("f,back=g"), "unknown key 'back'"),
            (both(""), "there has to be back=FILE or front=FILE"),
            (both("frames=1"), "there has to be back=FILE or front=FILE"),
            (both("f"), "'f' is not key=value"),
            (both("back="), "back= has no value"),
        ] {
            assert!(
                error.starts_with("--capture: ") && error.contains(part),
                "{error}"
            );
        }
    }
}

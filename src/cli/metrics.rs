//! `--metrics`: where a VM's counters go.

use std::time::Duration;

use vmm::{MetricsConfig, MetricsTarget};

use super::keys::{Key, KeyList, Missing, number};
use super::machine::path;
use crate::exit::{Failure, usage};

/// The keys behind FILE or unix:PATH.
pub static METRICS: KeyList = KeyList {
    flag: "--metrics",
    keys: &[
        Key {
            name: "interval",
            form: "MS",
            missing: Missing::Default("1000"),
            help: "from one line to the next",
        },
        Key {
            name: "format",
            form: "lines|prometheus",
            missing: Missing::Default("lines"),
            help: "what a socket gives: lines of JSON, or Prometheus' text by HTTP",
        },
    ],
};

/// Reads it.
pub fn parse(text: &str) -> Result<MetricsConfig, Failure> {
    let (target, keys) = text.split_once(',').unwrap_or((text, ""));
    let values = METRICS.parse(keys)?;
    let interval = values.need("interval", |text| {
        number(10..=60_000)(text).map(Duration::from_millis)
    })?;
    let prometheus = values.need("format", |text| match text {
        "lines" => Ok(false),
        "prometheus" => Ok(true),
        _ => Err("it is lines or prometheus".to_owned()),
    })?;
    let refused = |why: &str| usage(format!("--metrics: {target}: {why}"));
    let target = match (target.strip_prefix("unix:"), prometheus) {
        (None, true) => return Err(refused("format=prometheus needs unix:PATH")),
        (Some("") | None, _) if target.is_empty() || target == "unix:" => {
            return Err(usage("--metrics: there has to be FILE or unix:PATH"));
        }
        (None, false) => MetricsTarget::File(target.into()),
        (Some(socket), false) => MetricsTarget::Lines(path(socket).map_err(|why| refused(&why))?),
        (Some(socket), true) => {
            MetricsTarget::Prometheus(path(socket).map_err(|why| refused(&why))?)
        }
    };
    Ok(MetricsConfig { target, interval })
}

/// The same for a file or socket of this name in the directory that is given in its place.
pub fn inside(text: &str, name: &str) -> Result<String, Failure> {
    let (directory, keys) = text.split_once(',').unwrap_or((text, ""));
    let inside = match directory {
        "" | "unix:" => directory.to_owned(),
        _ => format!("{directory}/{name}"),
    };
    let text = match keys {
        "" => inside,
        _ => format!("{inside},{keys}"),
    };
    parse(&text).map(|_| text)
}

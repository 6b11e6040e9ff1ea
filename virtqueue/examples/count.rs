//! What a request costs, without a clock: `count lines` prints how many cache lines travel between two cores, by a model;
//! `count instructions` what callgrind counts (valgrind has to be installed). Both are the same at every run of the same build.
//!
//! `count side LAYOUT IN_ORDER USE BATCH REQUESTS` is what runs under callgrind.

use std::env;
use std::error::Error;
use std::process::{Command, ExitCode};

use virtqueue::packed::Packed;
use virtqueue::split::Split;
use virtqueue::{Layout, RingConfig};

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/common/turns.rs"]
mod turns;
use common::{Shared, place, place_at};
use turns::{Lines, SIZE, Turns};

const BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];
const RINGS: [(&str, bool); 4] = [
    ("split", false),
    ("split", true),
    ("packed", false),
    ("packed", true),
];
const USES: [&str; 2] = ["read", "written"];
const SIDES: [&str; 2] = ["driver", "device"];
/// Some turns around the ring, whole batches.
const REQUESTS: usize = 16 * 256;

fn name((layout, in_order): (&str, bool)) -> String {
    format!("{layout}{}", if in_order { " + in-order" } else { "" })
}

/// A row for each ring and use; a cell for each batch.
fn table(
    title: &str,
    cell: impl Fn((&str, bool), &str, usize) -> Result<String, Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    println!(
        "\n| {title} | b={} |",
        BATCHES.map(|b| b.to_string()).join(" | ")
    );
    println!("|---|{}", "---|".repeat(BATCHES.len()));
    for use_ in USES {
        for ring in RINGS {
            print!("| {use_}: {} |", name(ring));
            for batch in BATCHES {
                print!(" {} |", cell(ring, use_, batch)?);
            }
            println!();
        }
    }
    Ok(())
}

/// Lines per request: fetched by the driver and by the device.
fn lines<L: Layout>(in_order: bool, written: bool, batch: usize) -> String {
    let (config, data) = place_at::<L>(0, SIZE);
    let config = RingConfig { in_order, ..config };
    let [of_driver, of_device] = Lines::pair(data.try_into().unwrap());
    let driver = L::driver(of_driver.clone(), &config).unwrap();
    let device = L::device(of_device, &config).unwrap();
    let mut turns = Turns::new(driver, device, batch, data, written, 0);
    turns.run(REQUESTS);
    of_driver.fetched();
    turns.run(REQUESTS);
    let [driver, device] = of_driver
        .fetched()
        .map(|lines| lines as f64 / REQUESTS as f64);
    format!("{driver:.2} + {device:.2}")
}

/// What runs under callgrind.
fn side<L: Layout>(in_order: bool, written: bool, batch: usize, requests: usize) {
    let shared = Shared::new(1 << 20);
    let (config, data) = place::<L>(&shared, SIZE);
    let config = RingConfig { in_order, ..config };
    let driver = L::driver(shared.of_driver(), &config).unwrap();
    let device = L::device(shared.of_device(), &config).unwrap();
    Turns::new(driver, device, batch, data, written, 0).run(requests);
}

/// Events of callgrind, by name, while the turns of one side ran.
fn collect(
    side: &str,
    (layout, in_order): (&str, bool),
    use_: &str,
    batch: usize,
    requests: usize,
) -> Result<Vec<(String, f64)>, Box<dyn Error>> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .args(["--cache-sim=yes", "--branch-sim=yes"])
        .args(["--I1=32768,8,64", "--D1=32768,8,64", "--LL=33554432,16,64"])
        .arg(format!("--toggle-collect=*{side}_turn*"))
        .arg(env::current_exe()?)
        .args(["side", layout, if in_order { "on" } else { "off" }, use_])
        .args([batch.to_string(), requests.to_string()])
        .output()?;
    let text = String::from_utf8(output.stderr)?;
    let row = |title: &str| text.lines().find_map(|line| line.split_once(title));
    let (Some((_, names)), Some((_, values)), true) = (
        row("Events    : "),
        row("Collected : "),
        output.status.success(),
    ) else {
        return Err(text.into());
    };
    let values = values.split_whitespace().map(str::parse);
    names
        .split_whitespace()
        .zip(values)
        .map(|(name, value)| Ok((name.to_owned(), value?)))
        .collect()
}

/// The same per request, for a request that is added to a run that is going on.
fn per_request(
    side: &str,
    ring: (&str, bool),
    use_: &str,
    batch: usize,
) -> Result<Vec<(String, f64)>, Box<dyn Error>> {
    let short = collect(side, ring, use_, batch, REQUESTS)?;
    let long = collect(side, ring, use_, batch, 2 * REQUESTS)?;
    let each = |((name, short), (_, long)): ((String, f64), (String, f64))| {
        (name, (long - short) / REQUESTS as f64)
    };
    Ok(short.into_iter().zip(long).map(each).collect())
}

fn instructions() -> Result<(), Box<dyn Error>> {
    let mut all = Vec::new();
    for use_ in USES {
        for ring in RINGS {
            for batch in BATCHES {
                let [driver, device] = SIDES.map(|side| per_request(side, ring, use_, batch));
                all.push(((ring, use_, batch), driver?, device?));
            }
        }
    }
    for (title, events) in [
        ("instructions, driver + device", ["Ir"].as_slice()),
        ("data reads and writes", &["Dr", "Dw"]),
        ("misses of a first-level cache", &["I1mr", "D1mr", "D1mw"]),
        ("branches", &["Bc", "Bi"]),
        ("mispredicted branches", &["Bcm", "Bim"]),
    ] {
        let sum = |counts: &[(String, f64)]| -> f64 {
            let wanted = counts.iter().filter(|(name, _)| events.contains(&&**name));
            wanted.map(|(_, count)| count).sum()
        };
        table(title, |ring, use_, batch| {
            let found = all.iter().find(|(key, ..)| *key == (ring, use_, batch));
            let (_, driver, device) = found.ok_or("not measured")?;
            let digits = if events[0].contains('m') { 2 } else { 0 };
            let [driver, device] = [driver, device].map(|counts| sum(counts));
            Ok(format!("{driver:.digits$} + {device:.digits$}"))
        })?;
    }
    Ok(())
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *words {
        ["lines"] => table(
            "lines, driver + device",
            |(layout, in_order), use_, batch| {
                let of = if layout == "packed" {
                    lines::<Packed>
                } else {
                    lines::<Split>
                };
                Ok(of(in_order, use_ == "written", batch))
            },
        ),
        ["instructions"] => instructions(),
        ["side", layout, in_order, use_, batch, requests] => {
            let of = if layout == "packed" {
                side::<Packed>
            } else {
                side::<Split>
            };
            of(
                in_order == "on",
                use_ == "written",
                batch.parse()?,
                requests.parse()?,
            );
            Ok(())
        }
        _ => Err("usage: count lines | count instructions".into()),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("count: {error}");
            ExitCode::FAILURE
        }
    }
}

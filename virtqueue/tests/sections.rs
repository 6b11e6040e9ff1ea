//! Each public item says which section of the specification it is from.

use std::fs;
use std::path::{Path, PathBuf};

/// What the specification knows nothing of: memory of a process, and what tests need.
const OWN: [&str; 3] = ["linear.rs", "fuzz_bodies.rs", "test_memory.rs"];
/// Words that a public item begins with; a module's documentation is in its file.
const ITEMS: [&str; 7] = [
    "const fn ",
    "unsafe fn ",
    "fn ",
    "struct ",
    "enum ",
    "trait ",
    "const ",
];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.contains("tests") {
            continue;
        }
        if path.is_dir() {
            sources(&path, found);
        } else if name.ends_with(".rs") && !OWN.contains(&name) {
            found.push(path);
        }
    }
}

/// The public items of a source that name no section, with their lines.
fn silent(text: &str) -> Vec<String> {
    let mut silent = Vec::new();
    let mut named = false;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim_start();
        if let Some(docs) = line.strip_prefix("///") {
            named |= docs.contains("section");
            continue;
        }
        if line.starts_with("#[") || line.starts_with(")]") {
            continue;
        }
        let item = line
            .strip_prefix("pub ")
            .is_some_and(|item| ITEMS.iter().any(|word| item.starts_with(word)));
        if item && !named {
            silent.push(format!("{}: {line}", number + 1));
        }
        named = false;
    }
    silent
}

#[test]
fn an_item_without_a_section_is_found() {
    assert_eq!(
        silent("/// Of section 1.\n#[inline]\npub fn a() {}").len(),
        0
    );
    assert_eq!(
        silent("/// Of nothing.\npub fn a() {}"),
        ["2: pub fn a() {}"]
    );
    assert_eq!(
        silent("/// Section of `a`, section 1.\nfn a() {}\npub struct B;").len(),
        1
    );
}

#[test]
fn every_public_item_names_the_section_that_it_implements() {
    let mut files = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    );
    assert!(files.len() > 8, "{files:?}");
    for file in files {
        let silent = silent(&fs::read_to_string(&file).unwrap());
        assert!(silent.is_empty(), "{}: {silent:#?}", file.display());
    }
}

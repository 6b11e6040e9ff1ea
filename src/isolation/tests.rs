use std::collections::BTreeSet;

use anyhow::anyhow;
use clap::Parser;

use super::*;
use crate::cli::{Cli, Command};

fn args(args: &[&str]) -> IsolationArgs {
    match Cli::try_parse_from([&["vhost-pci", "isolation"], args].concat()) {
        Ok(Cli {
            command: Command::Isolation(args),
            ..
        }) => args,
        other => panic!("{other:?}"),
    }
}

fn names(all: &[Attack]) -> Vec<&'static str> {
    all.iter().map(|attack| attack.name).collect()
}

#[test]
fn there_are_many_kinds_and_no_two_have_one_name() {
    let all = attacks();
    let names: BTreeSet<&str> = names(&all).into_iter().collect();
    assert_eq!(names.len(), all.len());
    assert!(all.len() >= 40, "{}", all.len());
    for from in [From::BackEnd, From::FrontEnd] {
        let count = all.iter().filter(|attack| attack.from == from).count();
        assert!(count >= 20, "{from:?}: {count}");
    }
}

#[test]
fn each_mode_has_the_attacks_that_make_sense_there() {
    let count = |mode| chosen(&args(&["--mode", mode])).unwrap().len();
    assert_eq!(chosen(&args(&[])).unwrap().len(), attacks().len());
    assert!(count("windows") > count("whole") && count("whole") > count("none"));
    assert_eq!(count("readable"), count("windows"));
    assert!(count("none") > 10);
    let none = chosen(&args(&["--mode", "none"])).unwrap();
    assert!(
        none.iter()
            .all(|it| it.scene.in_mode(Mode::None) == Scene::Alone)
    );
    // The control has to have something to read.
    let whole = chosen(&args(&["--mode", "whole"])).unwrap();
    assert!(names(&whole).contains(&"read-after-unmap"));
}

#[test]
fn only_those_that_are_named_are_carried_out() {
    let only = |list: &[&str]| chosen(&args(&[&["--only"], list].concat()));
    let found = names(&only(&["race", "table-wrapping"]).unwrap());
    assert_eq!(found, ["race-for-an-unmapped-page", "table-wrapping"]);
    let Err(error) = only(&["race", "no-such"]) else {
        panic!("taken");
    };
    assert!(error.to_string().starts_with("--only no-such: "), "{error}");
    let windows_only = args(&["--mode", "none", "--only", "race"]);
    let Err(error) = chosen(&windows_only) else {
        panic!("taken");
    };
    assert!(error.to_string().contains("--mode none"), "{error}");
}

fn attack() -> Attack {
    Attack::new("x", From::BackEnd, Scene::Bare, ALL, |_| {
        panic!("not carried out")
    })
}

#[test]
fn a_vm_that_dies_is_a_success_of_the_attack_and_a_study_that_fails_is_none() {
    let mut report = Report::new(Mode::Windows);
    let victim = Trouble::Victim("the front-end VM ended".to_owned());
    record(&mut report, &attack(), Err(victim)).unwrap();
    assert_eq!(report.exit_code(), exit::FRAMES);
    assert_eq!(report.attacks[0].got_through, 1);
    assert_eq!(report.attacks[0].noticed, "the front-end VM ended");

    let mut report = Report::new(Mode::Windows);
    let study = Trouble::Study(anyhow!("no memory"));
    record(&mut report, &attack(), Err(study)).unwrap();
    assert_eq!(report.exit_code(), exit::HOST);
    assert!(report.attacks.is_empty());
    assert_eq!(report.failed[0].why, "no memory");
}

#[test]
fn a_signal_ends_the_study_at_once() {
    let mut report = Report::new(Mode::Windows);
    let signal = Trouble::Study(anyhow::Error::from(Failure::Signal(15)).context("here"));
    let error = record(&mut report, &attack(), Err(signal)).unwrap_err();
    assert_eq!(exit::of_error(&error), 143);
}

#[test]
fn a_scene_that_needs_an_iommu_is_an_ordinary_link_without() {
    use crate::cli::rings::Layout;
    let packed = Scene::Open(Layout::Packed);
    assert_eq!(packed.in_mode(Mode::Windows), packed);
    assert_eq!(packed.in_mode(Mode::Whole), Scene::Live(Layout::Packed));
    assert_eq!(packed.in_mode(Mode::None), Scene::Alone);
    assert_eq!(Scene::Bare.in_mode(Mode::Whole), Scene::Live(Layout::Split));
    assert_eq!(Scene::Alone.in_mode(Mode::Windows), Scene::Alone);
}

#[test]
fn what_was_seen_is_what_is_not_all_ones_or_a_secret_word() {
    let peek = |reads, ones, secrets| lab::Peek {
        reads,
        ones,
        secrets,
    };
    assert_eq!(peek(8, 8, 0).seen(), 0);
    assert_eq!(peek(8, 6, 0).seen(), 2);
    // A vector holds several words.
    assert_eq!(peek(1, 0, 8).seen(), 8);
    assert_eq!(lab::Peek::default().seen(), 0);
}

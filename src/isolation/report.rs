//! What the study found: a contract as JSON, and a table.

use serde::Serialize;

use crate::bench::table::align;
use crate::cli::isolation::Mode;
use crate::exit;

/// Who attacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum From {
    /// The back-end's guest, or its VMM's end.
    BackEnd,
    /// The front-end's guest, or a process in the place of its VMM.
    FrontEnd,
}

impl From {
    fn name(self) -> &'static str {
        match self {
            Self::BackEnd => "back-end",
            Self::FrontEnd => "front-end",
        }
    }
}

/// What came of an attack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Accesses, messages, rounds: what the attack consists of.
    pub tries: u64,
    /// What got through: words read, bytes changed, requests accepted that must not be; 1 where a VM died or hung.
    pub got_through: u64,
    /// What the victim noticed.
    pub noticed: String,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The attack.
    pub name: &'static str,
    /// Who attacks.
    pub from: From,
    /// How often it was tried.
    pub tries: u64,
    /// What got through.
    pub got_through: u64,
    /// What the victim noticed.
    pub noticed: String,
}

/// An attack that could not be carried out, so that nothing is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failed {
    /// The attack.
    pub name: &'static str,
    /// Who attacks.
    pub from: From,
    /// Why.
    pub why: String,
}

/// The whole file.
#[derive(Debug, Serialize)]
pub struct Report {
    schema_version: u32,
    /// What the window showed.
    mode: Mode,
    /// One a kind of attack, in the order in which they were carried out.
    pub attacks: Vec<Line>,
    /// Those that the study itself failed at.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<Failed>,
}

impl Report {
    /// Nothing yet.
    pub fn new(mode: Mode) -> Self {
        Self {
            schema_version: 1,
            mode,
            attacks: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// 0: nothing got through; 2: something did; 1: of some attacks nothing is known.
    pub fn exit_code(&self) -> u8 {
        if self.attacks.iter().any(|line| line.got_through > 0) {
            exit::FRAMES
        } else if self.attacks.is_empty() || !self.failed.is_empty() {
            exit::HOST
        } else {
            exit::OK
        }
    }

    /// For people.
    pub fn render(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .attacks
            .iter()
            .map(|line| {
                vec![
                    line.name.to_owned(),
                    line.from.name().to_owned(),
                    line.tries.to_string(),
                    line.got_through.to_string(),
                    format!(" {}", line.noticed),
                ]
            })
            .collect();
        let head = ["attack", "from", "tries", "got through", " noticed"];
        let mut text = left_last(&align(&head, &rows));
        let count = |lines: &[Line]| lines.iter().filter(|line| line.got_through > 0).count();
        let through = count(&self.attacks);
        let tries: u64 = self.attacks.iter().map(|line| line.tries).sum();
        let kinds = self.attacks.len();
        text.push_str(&format!(
            "\n{kinds} kinds of attack, {tries} tries, mode {}: {}\n",
            self.mode.name(),
            match through {
                0 => "nothing got through".to_owned(),
                1 => "1 kind got through".to_owned(),
                n => format!("{n} kinds got through"),
            }
        ));
        for failed in &self.failed {
            text.push_str(&format!("not known: {}: {}\n", failed.name, failed.why));
        }
        text
    }
}

/// The last column begins where it begins, and does not end where the longest of it ends.
fn left_last(table: &str) -> String {
    table
        .lines()
        .map(|line| match line.rsplit_once("   ") {
            // `align` put the padding before the mark that the column begins with.
            Some((rest, last)) => format!("{}  {}\n", rest.trim_end(), last.trim_start()),
            None => format!("{line}\n"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &'static str, got_through: u64) -> Line {
        Line {
            name,
            from: From::BackEnd,
            tries: 10,
            got_through,
            noticed: "3 faults".to_owned(),
        }
    }

    fn report(attacks: Vec<Line>) -> Report {
        Report {
            attacks,
            ..Report::new(Mode::Windows)
        }
    }

    fn failed() -> Failed {
        Failed {
            name: "c",
            from: From::FrontEnd,
            why: "no memory".to_owned(),
        }
    }

    #[test]
    fn one_word_that_got_through_is_exit_code_2_whatever_else_there_is() {
        assert_eq!(report(vec![line("a", 0), line("b", 0)]).exit_code(), 0);
        let mut bad = report(vec![line("a", 0), line("b", 1)]);
        assert_eq!(bad.exit_code(), 2);
        bad.failed.push(failed());
        assert_eq!(bad.exit_code(), 2);
    }

    #[test]
    fn a_study_that_failed_or_did_nothing_is_no_success() {
        assert_eq!(report(Vec::new()).exit_code(), 1);
        let mut good = report(vec![line("a", 0)]);
        good.failed.push(failed());
        assert_eq!(good.exit_code(), 1);
    }

    #[test]
    fn the_json_is_that_of_the_contract() {
        let json = serde_json::to_value(report(vec![line("a", 0)])).unwrap();
        let expected = serde_json::json!({
            "schema_version": 1,
            "mode": "windows",
            "attacks": [
                {"name": "a", "from": "back-end", "tries": 10, "got_through": 0, "noticed": "3 faults"}
            ]
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn the_table_says_how_many_kinds_got_through_and_what_is_not_known() {
        let mut report = report(vec![line("a", 0), line("bb", 7)]);
        report.failed.push(failed());
        let text = report.render();
        assert!(text.contains("2 kinds of attack, 20 tries, mode windows: 1 kind got through"));
        assert!(text.contains("not known: c: no memory"), "{text}");
        let columns: Vec<Option<usize>> = text.lines().take(3).map(|it| it.find("  3 f")).collect();
        assert_eq!(columns[1], columns[2], "{text}");
        assert!(columns[1].is_some());
    }
}

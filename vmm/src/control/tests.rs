use std::io::Read;
use std::os::unix::net::UnixStream;

use super::*;

fn outbox() -> (Arc<Outbox>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    (Outbox::new(ours.into()).unwrap(), theirs)
}

fn output(outbox: Arc<Outbox>) -> ControlOutput {
    ControlOutput {
        outbox: Some(outbox),
        reports: None,
        capture: None,
    }
}

fn write(outbox: &Arc<Outbox>, text: &str) {
    output(Arc::clone(outbox))
        .write_all(text.as_bytes())
        .unwrap();
}

fn received(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_record_of_the_vmm_never_lies_inside_a_line_of_the_guest() {
    let (outbox, mut socket) = outbox();
    write(&outbox, "half a ");
    outbox.record("vmm", "\"x\":1");
    write(&outbox, "line\n");
    assert!(!outbox.flush());
    assert_eq!(
        received(&mut socket),
        "{\"record\":\"vmm\",\"x\":1}\nhalf a line\n"
    );
}

#[test]
fn an_overlong_line_of_the_guest_is_replaced_by_an_error_record() {
    let (outbox, mut socket) = outbox();
    write(&outbox, &"x".repeat(LINE_LIMIT + 10));
    write(&outbox, "\nshort\n");
    outbox.flush();
    let text = received(&mut socket);
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[0].starts_with("{\"record\":\"error\"") && lines[1] == "short" && lines.len() == 2,
        "{text:.200}"
    );
}

#[test]
fn a_socket_that_nobody_reads_stops_the_guest_and_costs_bounded_memory() {
    let (outbox, _socket) = outbox();
    let line = "y".repeat(999) + "\n";
    let control = output(Arc::clone(&outbox));
    assert!(control.has_room());
    for _ in 0..3000 {
        write(&outbox, &line);
        outbox.flush();
    }
    assert!(!control.has_room());
    assert!(lock(&outbox.state).ready.len() <= OUTPUT_LIMIT);
}

#[test]
fn a_socket_that_was_closed_takes_everything_and_keeps_nothing() {
    let (outbox, socket) = outbox();
    drop(socket);
    write(&outbox, "one\n");
    assert!(!outbox.flush());
    write(&outbox, "two\n");
    assert!(lock(&outbox.state).ready.is_empty());
    assert!(output(outbox).has_room());
}

#[test]
fn unknown_text_becomes_harmless_in_json() {
    assert_eq!(printable("a\"b\\c\n"), "a\\\\x22b\\\\x5cc\\\\xa");
    assert_eq!(printable(&"z".repeat(100)).len(), 64);
}

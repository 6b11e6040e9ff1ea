//! One page with all charts in it. It asks nothing of the network and runs no script.

use serde_json::Value;

use super::draw;
use super::panels::Panel;
use super::read::Report;

const STYLE: &str = "
:root{color-scheme:light dark}
body{font-family:sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;background:#ffffff;color:#24292f}
figure{display:inline-block;margin:0 1em 1em 0}
table{border-collapse:collapse}
th,td{text-align:left;vertical-align:top;padding:.15em 1em .15em 0}
code,pre{white-space:pre-wrap;overflow-wrap:anywhere}
svg{max-width:100%;height:auto}
@media (prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}}
";

/// The page.
pub fn page(report: &Report, panels: &[Panel]) -> anyhow::Result<String> {
    let mut rows = String::new();
    table("", &report.environment_json, &mut rows);
    let mut body = format!(
        "<h1>vhost-pci bench</h1>\n<p><code>{}</code></p>\n<h2>Where it was measured</h2>\n<table>\n{rows}</table>\n<h2>Charts</h2>\n",
        text(&report.command.join(" "))
    );
    for panel in panels {
        let left_out = match panel.left_out {
            0 => String::new(),
            count => format!(
                "<figcaption>Not drawn: {count} figures of other distances of the cores.</figcaption>\n"
            ),
        };
        body.push_str(&format!(
            "<figure id=\"{}\">\n{}{left_out}</figure>\n",
            text(&panel.slug),
            draw::figure(std::slice::from_ref(panel), &[])?
        ));
    }
    body.push_str("<p>Lines and bars: medians; thin lines: least and most of the samples.</p>\n");
    body.push_str(&peers(report));
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n<title>vhost-pci bench</title>\n<style>{STYLE}</style>\n\
         </head>\n<body>\n{body}</body>\n</html>\n"
    ))
}

/// How the peers were called, each once.
fn peers(report: &Report) -> String {
    let mut seen: Vec<&[String]> = Vec::new();
    let mut lines = String::new();
    for peer in &report.peers {
        if !seen.contains(&peer.command.as_slice()) {
            seen.push(&peer.command);
            lines.push_str(&format!(
                "<h3>{}</h3>\n<pre>{}</pre>\n",
                text(&peer.name),
                text(&peer.command.join("\n"))
            ));
        }
    }
    if lines.is_empty() {
        return lines;
    }
    format!("<h2>The peers' commands</h2>\n{lines}")
}

/// A row a value; what lies in an object has the object's name before its own.
fn table(name: &str, value: &Value, rows: &mut String) {
    if let Value::Object(fields) = value {
        for (key, value) in fields {
            let name = if name.is_empty() {
                key.clone()
            } else {
                format!("{name} {key}")
            };
            table(&name, value, rows);
        }
        return;
    }
    let shown = match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => {
            let items = items.iter().map(|item| match item {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            });
            items.collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    };
    rows.push_str(&format!(
        "<tr><th>{}</th><td>{}</td></tr>\n",
        text(&name.replace('_', " ")),
        text(&shown)
    ));
}

/// A text that cannot be taken for markup.
fn text(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

//! The flags of `relay`.

use std::path::PathBuf;

use clap::Args;
use devices::vhost_user::SocketRole;

use super::Mode;
use super::keys::{FRONT_END_LISTEN, FRONT_END_SOCKET, Key, KeyList, switch};
use crate::exit::{Failure, usage};

const KEYS: &[Key] = &[FRONT_END_SOCKET, FRONT_END_LISTEN];

static PORTS: [KeyList; 2] = [
    KeyList {
        flag: "--a",
        keys: KEYS,
    },
    KeyList {
        flag: "--b",
        keys: KEYS,
    },
];

/// `relay`.
#[derive(Debug, Args)]
pub struct RelayArgs {
    #[arg(long, value_name = "KEY=VALUE,…", help = PORTS[0].help("One front-end"))]
    pub a: String,
    #[arg(long, value_name = "KEY=VALUE,…", help = PORTS[1].help("The other front-end"))]
    pub b: String,
    /// How frames are waited for
    #[arg(long, value_enum, default_value = "poll")]
    pub mode: Mode,
    /// Stay on this host core
    #[arg(long, value_name = "N")]
    pub core: Option<usize>,
    /// End when this process, the parent, ends
    #[arg(long, value_name = "PID", hide = true)]
    pub parent: Option<u32>,
}

/// Where a front-end is met.
#[derive(Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// The socket's path.
    pub path: PathBuf,
    /// Who makes it.
    pub role: SocketRole,
}

impl RelayArgs {
    /// Both front-ends, `--a` first.
    pub fn ports(&self) -> Result<[PortConfig; 2], Failure> {
        let port = |list: &'static KeyList, text: &str| {
            let values = list.parse(text)?;
            Ok::<_, Failure>(PortConfig {
                path: values.need("socket", |path| Ok(path.into()))?,
                role: match values.need("listen", switch)? {
                    true => SocketRole::Listen,
                    false => SocketRole::Connect,
                },
            })
        };
        let ports = [port(&PORTS[0], &self.a)?, port(&PORTS[1], &self.b)?];
        if ports[0].path == ports[1].path {
            return Err(usage("--a and --b: they need a socket each"));
        }
        Ok(ports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn ports(a: &str, b: &str) -> Result<[PortConfig; 2], Failure> {
        match Cli::try_parse_from(["vhost-pci", "relay", "--a", a, "--b", b]) {
            Ok(Cli {
                command: Command::Relay(args),
                ..
            }) => args.ports(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_port_says_where_it_is_met_and_by_whom() {
        let [a, b] = ports("socket=/x", "socket=/y,listen=off").unwrap();
        assert_eq!((a.path.to_str(), a.role), (Some("/x"), SocketRole::Listen));
        assert_eq!((b.path.to_str(), b.role), (Some("/y"), SocketRole::Connect));
    }

    #[test]
    fn a_wrong_port_is_named() {
        for (a, b, part) in [
            ("", "socket=/y", "--a: the key 'socket' is missing"),
            ("socket=/x", "socket=/y,listen=no", "--b: listen=no"),
            ("socket=/x", "socket=/x", "a socket each"),
        ] {
            let error = ports(a, b).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}

//! `axl`: the command line of a running system. Its verbs are those of `xl`.

#![forbid(unsafe_code)]

use axl::disk::{self, DiskCommand};
use axl::keyboard::{Keyboard, Typed};
use axl::{Client, ClientError, show, vbd};
use axolotl_abi::protocol::{Request, Response};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Looks at a running Axolotl system, and acts on its domains.
#[derive(Parser)]
#[command(name = "axl", version)]
struct Arguments {
    /// Prints JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Which system, when several are running.
    #[arg(long, global = true, value_name = "NAME")]
    system: Option<String>,
    /// The socket of the system, instead of the one in the run directory.
    #[arg(long, global = true, value_name = "PATH", conflicts_with = "system")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lists all domains.
    List,
    /// Shows the machine: version, processors, memory, and whose devices are trusted.
    Info,
    /// Makes a domain fault, as a bug in it would.
    Crash {
        /// The domain.
        name: String,
    },
    /// Starts a domain's next incarnation, whatever its state.
    Restart {
        /// The domain.
        name: String,
    },
    /// Tells why a domain's last incarnation ended.
    Why {
        /// The domain.
        name: String,
    },
    /// Shows a domain's console, and goes on until Ctrl-C. At a terminal, what is typed goes to a guest
    /// that reads it, and Ctrl-] ends it, as with `xl`.
    Console {
        /// The domain.
        name: String,
        /// Ends after what is there now.
        #[arg(long)]
        no_follow: bool,
    },
    /// Shows the core's messages.
    Dmesg,
    /// Shows xenstore, or the part of it below a path.
    XenstoreLs {
        /// Where to start.
        #[arg(default_value = "/")]
        path: String,
        /// Shows permissions too.
        #[arg(short, long)]
        perms: bool,
    },
    /// Stops a domain until `unpause`.
    Pause {
        /// The domain.
        name: String,
    },
    /// Continues a paused domain.
    Unpause {
        /// The domain.
        name: String,
    },
    /// Asks a guest to end by itself; its `on_poweroff` decides what follows.
    Shutdown {
        /// The domain.
        name: String,
        /// Asks it to start again instead; `on_reboot` decides.
        #[arg(short = 'R', long)]
        reboot: bool,
    },
    /// Asks a guest to use so much memory, at most what its system file gives it.
    MemSet {
        /// The domain.
        name: String,
        /// MiB.
        mib: u32,
    },
    /// Lists the disks of a guest, or of all.
    #[command(alias = "block-list")]
    VbdList {
        /// The guest.
        name: Option<String>,
    },
    /// Frees all that a domain has.
    Destroy {
        /// The domain.
        name: String,
    },
    /// Makes and inspects disks as files on the host; needs no running system.
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Checks a system file and explains it: who owns what, who may talk to whom.
    Check {
        /// The system file.
        file: PathBuf,
    },
}

/// Why the command failed.
enum Failure {
    Client(ClientError),
    /// Standard output is closed: nobody wants to know more.
    Quiet,
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.command {
        Command::Check { file } => return check(file, arguments.json),
        Command::Disk(command) => return disk(command, arguments.json),
        command => connect(&arguments)
            .map_err(Failure::from)
            .and_then(|mut client| run(&mut client, command, arguments.json)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Quiet) => ExitCode::SUCCESS,
        Err(Failure::Client(error)) => {
            let _ = writeln!(std::io::stderr(), "axl: {error}");
            ExitCode::FAILURE
        }
    }
}

fn connect(arguments: &Arguments) -> Result<Client, ClientError> {
    match &arguments.socket {
        Some(path) => Client::connect(path),
        None => Client::find(arguments.system.as_deref()),
    }
}

fn run(client: &mut Client, command: &Command, json: bool) -> Result<(), Failure> {
    match command {
        Command::List => match client.request(Request::List)? {
            Response::List(domains) if json => print_json(&show::list_json(&domains)),
            Response::List(domains) => print(&show::list(&domains)),
            _ => unexpected(),
        },
        Command::Info => match client.request(Request::Info)? {
            Response::Info(info) if json => print_json(&show::info_json(&info)),
            Response::Info(info) => print(&show::info(&info)),
            _ => unexpected(),
        },
        Command::Why { name } => match client.request(Request::Why(name.clone()))? {
            Response::Why(why) if json => print_json(&show::why_json(&why)),
            Response::Why(why) => print(&show::why(&why)),
            _ => unexpected(),
        },
        Command::Crash { name } => act(client, Request::Crash(name.clone()), name, "crashed", json),
        Command::Restart { name } => {
            act(client, Request::Restart(name.clone()), name, "restarted", json)
        }
        Command::Pause { name } => act(client, Request::Pause(name.clone()), name, "paused", json),
        Command::Unpause { name } => {
            act(client, Request::Unpause(name.clone()), name, "continues", json)
        }
        Command::Shutdown { name, reboot } => {
            let request = Request::Shutdown { name: name.clone(), reboot: *reboot };
            act(client, request, name, "is asked to end", json)
        }
        Command::MemSet { name, mib } => {
            let request = Request::SetMemory { name: name.clone(), mib: *mib };
            act(client, request, name, &format!("is asked to use {mib} MiB"), json)
        }
        Command::VbdList { name } => {
            let vbds = vbd::list(client, name.as_deref())?;
            if json { print_json(&vbd::json(&vbds)) } else { print(&vbd::text(&vbds)) }
        }
        Command::Destroy { name } => {
            act(client, Request::Destroy(name.clone()), name, "destroyed", json)
        }
        Command::Console { name, no_follow } => {
            let ask = |position| Request::ConsoleRead { name: name.clone(), position };
            let keyboard = if *no_follow || json { None } else { Keyboard::open() };
            console(client, ask, !no_follow, json, keyboard.as_ref().map(|keys| (keys, &**name)))
        }
        Command::Dmesg => {
            console(client, |position| Request::Dmesg { position }, false, json, None)
        }
        Command::XenstoreLs { path, perms } => xenstore_ls(client, path, *perms, json),
        Command::Check { .. } | Command::Disk(_) => Ok(()),
    }
}

fn unexpected() -> Result<(), Failure> {
    Err(ClientError::NotUnderstood.into())
}

fn act(
    client: &mut Client,
    request: Request,
    name: &str,
    done: &str,
    as_json: bool,
) -> Result<(), Failure> {
    match client.request(request)? {
        Response::Done if as_json => print_json(&json!({ "name": name, "result": done })),
        Response::Done => print(&format!("{name} {done}\n")),
        _ => unexpected(),
    }
}

/// Shows a console from its oldest byte; goes on when `follow`. As JSON: one string when it ends, or
/// one per line while it goes on.
fn console(
    client: &mut Client,
    ask: impl Fn(u64) -> Request,
    follow: bool,
    as_json: bool,
    keyboard: Option<(&Keyboard, &str)>,
) -> Result<(), Failure> {
    let mut position = 0;
    let mut all = Vec::new();
    loop {
        let Response::Console { start, bytes } = client.request(ask(position))? else {
            return unexpected();
        };
        position = start.saturating_add(bytes.len() as u64);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match (bytes.is_empty(), as_json) {
            (true, _) if follow => match keyboard {
                None => std::thread::sleep(Duration::from_millis(200)),
                Some((keyboard, name)) => match keyboard.typed() {
                    Typed::Nothing => {}
                    Typed::Detach => return Ok(()),
                    Typed::Bytes(bytes) => type_on(client, name, bytes)?,
                },
            },
            (true, _) => break,
            (false, true) if follow => print_line(&json!({ "start": start, "text": text }))?,
            (false, true) => all.extend(bytes),
            (false, false) => print(&show::printable(&text))?,
        }
    }
    if as_json { print_json(&json!({ "text": String::from_utf8_lossy(&all) })) } else { Ok(()) }
}

/// Types on a guest's console. One that does not read it loses what is typed.
fn type_on(client: &mut Client, name: &str, bytes: Vec<u8>) -> Result<(), Failure> {
    match client.request(Request::ConsoleWrite { name: name.to_owned(), bytes }) {
        Ok(_) | Err(ClientError::Refused(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Most nodes that are shown.
const MAX_NODES: usize = 100_000;

/// A node whose children are still to be shown: its path, its name, and its depth.
struct Node {
    path: String,
    name: String,
    depth: usize,
}

fn xenstore_ls(client: &mut Client, root: &str, perms: bool, as_json: bool) -> Result<(), Failure> {
    let root = if root.len() > 1 { root.trim_end_matches('/') } else { root };
    let mut stack = vec![Node { path: root.into(), name: root.into(), depth: 0 }];
    let mut nodes = Vec::new();
    let mut shown = 0;
    while let Some(node) = stack.pop() {
        let answer = client.request(Request::XenstoreLs(node.path.clone()));
        let (value, children, permissions) = match answer {
            Ok(Response::Node { value, children, perms }) => (value, children, perms),
            Ok(_) => return unexpected(),
            // It was removed since its parent was listed.
            Err(ClientError::Refused(_)) if node.depth > 0 => continue,
            Err(error) => return Err(error.into()),
        };
        let text = String::from_utf8_lossy(&value).into_owned();
        if as_json {
            nodes.push(json!({ "path": node.path, "value": text, "perms": permissions }));
        } else if node.depth > 0 || !value.is_empty() {
            let indent = " ".repeat(node.depth.saturating_sub(1));
            let list =
                if perms { format!("   ({})", permissions.join(",")) } else { String::new() };
            let value = show::printable(&text).replace('\n', "\\n");
            print(&format!("{indent}{} = \"{value}\"{list}\n", node.name))?;
        }
        shown += 1;
        if shown >= MAX_NODES {
            break;
        }
        let parent = node.path.trim_end_matches('/');
        stack.extend(children.into_iter().rev().map(|name| Node {
            path: format!("{parent}/{name}"),
            name,
            depth: node.depth + 1,
        }));
    }
    if as_json { print_json(&Value::Array(nodes)) } else { Ok(()) }
}

fn disk(command: &DiskCommand, as_json: bool) -> ExitCode {
    match disk::run(command) {
        Ok((text, value)) => {
            drop(if as_json { print_json(&value) } else { print(&text) });
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "axl: {error}");
            ExitCode::FAILURE
        }
    }
}

fn check(file: &std::path::Path, as_json: bool) -> ExitCode {
    match system::load(file) {
        Ok(compiled) => {
            let text = system::explain(&compiled);
            let printed = if as_json {
                let domains = compiled.system.domains.iter().map(|domain| domain.name.as_str());
                print_json(&json!({
                    "ok": true,
                    "system": compiled.system.name,
                    "domains": domains.collect::<Vec<_>>(),
                    "warnings": compiled.warnings,
                    "explanation": text,
                }))
            } else {
                print(&text)
            };
            drop(printed);
            ExitCode::SUCCESS
        }
        Err(error) => {
            if as_json {
                drop(print_json(&json!({
                    "ok": false,
                    "file": error.path(),
                    "line": error.line(),
                    "message": error.message(),
                    "hint": error.hint(),
                })));
            } else {
                let report = miette::Report::new(*error);
                let _ = writeln!(std::io::stderr(), "{report:?}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Prints to standard output. `println!` would panic when a pipe is closed.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Failure::Quiet),
        _ => Ok(()),
    }
}

fn print_line(value: &Value) -> Result<(), Failure> {
    print(&format!("{value}\n"))
}

fn print_json(value: &Value) -> Result<(), Failure> {
    print(&format!("{value:#}\n"))
}

//! What the guest tells about itself and the platform, as a page and as JSON.

use crate::shelf::File;
use alloc::format;
use alloc::string::{String, ToString};
use core::fmt::Write;

/// What the guest knows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Status {
    /// Its name in the system file.
    pub name: String,
    /// Its domain id.
    pub domid: u16,
    /// Its own incarnation.
    pub incarnation: u32,
    /// Since its start.
    pub uptime_ms: u64,
    /// Heap.
    pub memory_bytes: u64,
    /// Of it, in use.
    pub memory_used_bytes: u64,
    /// Ethernet address.
    pub mac: [u8; 6],
    /// IP address with prefix; empty before there is one.
    pub ip: String,
    /// How the address was found: `dhcp` or `static`.
    pub addressing: &'static str,
    /// Default gateway; empty when there is none.
    pub gateway: String,
    /// Domain that serves its network interface.
    pub backend_domid: u16,
    /// That end's xenbus state, by name.
    pub backend_state: &'static str,
    /// Frames received.
    pub rx_frames: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames sent.
    pub tx_frames: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Requests answered.
    pub requests: u64,
    /// Connections open now.
    pub connections: u64,
    /// Gaps in the backend's answers.
    pub pauses: u64,
    /// The last one.
    pub last_pause_us: u64,
    /// When it ended, since the guest's start.
    pub last_pause_at_ms: u64,
    /// The longest one.
    pub longest_pause_us: u64,
    /// Times that the interface had to be connected.
    pub connects: u64,
    /// Its disk, if it has one.
    pub disk: Option<DiskStatus>,
}

/// What the guest knows of its disk.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DiskStatus {
    /// Domain that serves it.
    pub backend_domid: u16,
    /// That end's xenbus state, by name.
    pub backend_state: &'static str,
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Files on it.
    pub files: u64,
    /// Why there are none; empty when nothing is wrong.
    pub trouble: String,
    /// Requests made.
    pub requests: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Gaps in the backend's answers.
    pub pauses: u64,
    /// The last one.
    pub last_pause_us: u64,
    /// When it ended, since the guest's start.
    pub last_pause_at_ms: u64,
    /// The longest one.
    pub longest_pause_us: u64,
}

/// `bytes` as `aa:bb:...`.
fn mac(bytes: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = bytes;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

fn duration(ms: u64) -> String {
    let (s, m, h) = (ms / 1000, ms / 60_000, ms / 3_600_000);
    match (h, m) {
        (0, 0) => format!("{s}.{} s", ms % 1000 / 100),
        (0, _) => format!("{m} min {} s", s % 60),
        _ => format!("{h} h {} min", m % 60),
    }
}

fn micros(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

/// A pause, and how long ago it was.
fn last_pause(us: u64, at_ms: u64, uptime_ms: u64) -> String {
    format!("{}, {} ago", micros(us), duration(uptime_ms.saturating_sub(at_ms)))
}

/// Rows about pauses.
fn pause_rows(count: u64, longest_us: u64, last: String) -> [(&'static str, String); 3] {
    let known = |text| if count == 0 { "none".into() } else { text };
    [
        ("Pauses noticed", count.to_string()),
        ("Longest", known(micros(longest_us))),
        ("Last", known(last)),
    ]
}

fn bytes(count: u64) -> String {
    const KIB: u64 = 1024;
    match count {
        0..KIB => format!("{count} B"),
        KIB..0x10_0000 => format!("{}.{} KiB", count / KIB, count % KIB * 10 / KIB),
        _ => format!("{}.{} MiB", count >> 20, (count >> 10) % KIB * 10 / KIB),
    }
}

/// Text for an element: names come from a file that somebody wrote.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            _ => out.push(c),
        }
    }
    out
}

const HEAD: &str = r#"<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>Axolotl</title><style>
:root{--ink:#24303a;--soft:#6b7a86;--line:#e4e9ec;--card:#fff;--back:#f3f6f7;--accent:#e0608a}
@media(prefers-color-scheme:dark){:root{--ink:#e6ecef;--soft:#93a2ad;--line:#2c3840;--card:#1b242a;--back:#12191d;--accent:#f48fb1}}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:3rem 1.25rem}h1{margin:0;font-size:2.2rem;letter-spacing:-.02em}
h1 b{color:var(--accent)}p{color:var(--soft);margin:.4rem 0 2rem;max-width:42rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(22rem,100%),1fr));gap:1rem}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:1.1rem 1.3rem}
h2{margin:0 0 .6rem;font-size:.8rem;text-transform:uppercase;letter-spacing:.09em;color:var(--accent)}
dl{margin:0;display:grid;grid-template-columns:auto 1fr;gap:.25rem 1rem}dt{color:var(--soft)}
dd{margin:0;text-align:right;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
footer{margin-top:2rem;color:var(--soft);font-size:.9rem}code{color:var(--ink)}a{color:var(--accent)}
</style></head><body><main>"#;

const FOOT: &str = r#"</div><footer>Try it: start <a href="/bytes/100000000"><code>/bytes/100000000</code></a>, run
<code>cargo axl crash net0</code> (or what your driver domain is called) meanwhile, and load this page again: the download
goes on, with one more pause here. A pause is an answer that took over 3 ms; a busy or emulated machine has some without
any crash. More: <a href="/status.json"><code>/status.json</code></a>, <code>curl --data-binary @file …/echo</code>."#;

const DISK_FOOT: &str = r#" The same for the disk: <a href="/disk/"><code>/disk/</code></a> and
<code>cargo axl crash disk0</code>."#;

const END: &str = "</footer></main></body></html>\n";

fn section(out: &mut String, title: &str, rows: &[(&str, String)]) {
    let _ = write!(out, "<section><h2>{title}</h2><dl>");
    for (name, value) in rows {
        let _ = write!(out, "<dt>{name}</dt><dd>{}</dd>", escape(value));
    }
    out.push_str("</dl></section>");
}

/// The page.
#[must_use]
pub fn html(s: &Status) -> String {
    let mut out = String::with_capacity(6 * 1024);
    out.push_str(HEAD);
    let _ = write!(
        out,
        "<h1>Hello from <b>{}</b></h1><p>This page was served by a guest of Axolotl, the \
         hypervisor whose drivers grow back. Its network card belongs to another domain, which can \
         be killed at any moment; from here that is only a pause.</p><div class=\"grid\">",
        escape(&s.name)
    );
    section(
        &mut out,
        "This guest",
        &[
            ("Domain", format!("d{}", s.domid)),
            ("Incarnation", s.incarnation.to_string()),
            ("Up for", duration(s.uptime_ms)),
            ("Heap", bytes(s.memory_bytes)),
            ("In use", bytes(s.memory_used_bytes)),
        ],
    );
    let or_none = |text: &String| if text.is_empty() { "none".into() } else { text.clone() };
    section(
        &mut out,
        "Network",
        &[
            ("MAC", mac(s.mac)),
            ("Address", format!("{} ({})", or_none(&s.ip), s.addressing)),
            ("Gateway", or_none(&s.gateway)),
            ("Received", format!("{} frames, {}", s.rx_frames, bytes(s.rx_bytes))),
            ("Sent", format!("{} frames, {}", s.tx_frames, bytes(s.tx_bytes))),
        ],
    );
    let last = last_pause(s.last_pause_us, s.last_pause_at_ms, s.uptime_ms);
    let [pauses, longest, last] = pause_rows(s.pauses, s.longest_pause_us, last);
    let domain = ("Domain", format!("d{}, {}", s.backend_domid, s.backend_state));
    let rows = [domain, ("Connected", times(s.connects)), pauses, longest, last];
    section(&mut out, "Its network driver", &rows);
    if let Some(disk) = &s.disk {
        disk_sections(&mut out, disk, s.uptime_ms);
    }
    section(
        &mut out,
        "Web server",
        &[("Requests", s.requests.to_string()), ("Connections now", s.connections.to_string())],
    );
    out.push_str(FOOT);
    if s.disk.is_some() {
        out.push_str(DISK_FOOT);
    }
    out.push_str(END);
    out
}

fn disk_sections(out: &mut String, disk: &DiskStatus, uptime_ms: u64) {
    let files = if disk.trouble.is_empty() { disk.files.to_string() } else { disk.trouble.clone() };
    let rows = [
        ("Size", format!("{} ({} sectors)", bytes(disk.sectors * 512), disk.sectors)),
        ("Files", files),
        ("Requests", format!("{}, {} failed", disk.requests, disk.errors)),
        ("Read", bytes(disk.read_bytes)),
    ];
    section(out, "Disk", &rows);
    let last = last_pause(disk.last_pause_us, disk.last_pause_at_ms, uptime_ms);
    let [pauses, longest, last] = pause_rows(disk.pauses, disk.longest_pause_us, last);
    let domain = ("Domain", format!("d{}, {}", disk.backend_domid, disk.backend_state));
    section(out, "Its disk driver", &[domain, pauses, longest, last]);
}

/// The list of files on the disk.
#[must_use]
pub fn list(files: &[File]) -> String {
    let mut out = String::with_capacity(4 * 1024);
    out.push_str(HEAD);
    out.push_str("<h1>Files on the <b>disk</b></h1><p>Read through another domain, which can be killed at any moment.</p>");
    out.push_str("<div class=\"grid\"><section><h2>Files</h2><dl>");
    for file in files {
        let name = escape(&file.name);
        let _ = write!(
            out,
            "<dt><a href=\"/disk/{name}\">{name}</a></dt><dd>{}</dd>",
            bytes(file.bytes)
        );
    }
    out.push_str("</dl></section></div></main></body></html>\n");
    out
}

fn times(count: u64) -> String {
    match count {
        1 => "once".into(),
        _ => format!("{count} times"),
    }
}

/// Text for a JSON string.
fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if u32::from(c) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The same as JSON, with the field names of [`Status`]; those of the disk begin with `disk_`, and
/// are there only if there is one.
#[must_use]
pub fn json(s: &Status) -> String {
    let texts = [
        ("name", s.name.clone()),
        ("mac", mac(s.mac)),
        ("ip", s.ip.clone()),
        ("addressing", s.addressing.into()),
        ("gateway", s.gateway.clone()),
        ("backend_state", s.backend_state.into()),
    ];
    let numbers = [
        ("domid", u64::from(s.domid)),
        ("incarnation", u64::from(s.incarnation)),
        ("uptime_ms", s.uptime_ms),
        ("memory_bytes", s.memory_bytes),
        ("memory_used_bytes", s.memory_used_bytes),
        ("backend_domid", u64::from(s.backend_domid)),
        ("rx_frames", s.rx_frames),
        ("rx_bytes", s.rx_bytes),
        ("tx_frames", s.tx_frames),
        ("tx_bytes", s.tx_bytes),
        ("requests", s.requests),
        ("connections", s.connections),
        ("pauses", s.pauses),
        ("last_pause_us", s.last_pause_us),
        ("last_pause_at_ms", s.last_pause_at_ms),
        ("longest_pause_us", s.longest_pause_us),
        ("connects", s.connects),
    ];
    let mut out = String::from("{");
    fields(&mut out, &texts, &numbers);
    if let Some(disk) = &s.disk {
        disk_json(&mut out, disk);
    }
    out.pop();
    out.push_str("}\n");
    out
}

fn disk_json(out: &mut String, disk: &DiskStatus) {
    let texts =
        [("disk_backend_state", disk.backend_state.into()), ("disk_trouble", disk.trouble.clone())];
    let numbers = [
        ("disk_backend_domid", u64::from(disk.backend_domid)),
        ("disk_sectors", disk.sectors),
        ("disk_files", disk.files),
        ("disk_requests", disk.requests),
        ("disk_errors", disk.errors),
        ("disk_read_bytes", disk.read_bytes),
        ("disk_pauses", disk.pauses),
        ("disk_last_pause_us", disk.last_pause_us),
        ("disk_last_pause_at_ms", disk.last_pause_at_ms),
        ("disk_longest_pause_us", disk.longest_pause_us),
    ];
    fields(out, &texts, &numbers);
}

/// Fields of an object, each with a comma behind it.
fn fields(out: &mut String, texts: &[(&str, String)], numbers: &[(&str, u64)]) {
    for (name, value) in texts {
        let _ = write!(out, "\"{name}\":{},", quote(value));
    }
    for (name, value) in numbers {
        let _ = write!(out, "\"{name}\":{value},");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_break_the_page_or_the_json() {
        let status = Status { name: "<b>\"\\\n".into(), ..Status::default() };
        assert!(html(&status).contains("Hello from <b>&lt;b&gt;&quot;\\\n</b>"));
        assert!(json(&status).starts_with(r#"{"name":"<b>\"\\\u000a","#));
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let page = html(&Status { ip: "10.0.2.15/24".into(), pauses: 3, ..Status::default() });
        assert!(
            page.contains("10.0.2.15/24") && page.contains("<dt>Pauses noticed</dt><dd>3</dd>")
        );
        assert!(!page.contains("http") && !page.contains("src=") && page.len() < 8 * 1024);
        assert!(!page.contains("disk"), "there is none");
    }

    #[test]
    fn a_disk_is_shown_when_there_is_one() {
        let disk = DiskStatus {
            backend_domid: 3,
            backend_state: "connected",
            sectors: 4096,
            trouble: "a <b>".into(),
            ..DiskStatus::default()
        };
        let status = Status { disk: Some(disk), ..Status::default() };
        let (page, json) = (html(&status), json(&status));
        assert!(page.contains("2.0 MiB (4096 sectors)") && page.contains("d3, connected"));
        assert!(page.contains("a &lt;b&gt;") && page.contains("href=\"/disk/\""));
        assert!(json.contains("\"disk_sectors\":4096,") && json.ends_with("_us\":0}\n"));
        let without = self::json(&Status::default());
        assert!(!without.contains("disk") && without.ends_with("\"connects\":0}\n"));
    }

    #[test]
    fn quantities_are_readable() {
        assert_eq!([bytes(1023), bytes(1536), bytes(5 << 19)], ["1023 B", "1.5 KiB", "2.5 MiB"]);
        assert_eq!([duration(61_000), duration(1_234)], ["1 min 1 s", "1.2 s"]);
        assert_eq!(duration(3_720_000), "1 h 2 min");
    }
}

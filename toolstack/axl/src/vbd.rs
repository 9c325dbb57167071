//! Guests' disks, as xenstore has them.

use crate::{Client, ClientError};
use axolotl_abi::protocol::{Failure, Request, Response};
use serde_json::{Value, json};
use std::fmt::Write as _;

/// A disk of a guest. What a side has not written yet is `None`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vbd {
    /// The guest.
    pub domain: String,
    /// Its number in the guest, such as 51712.
    pub number: u32,
    /// Its name there, such as `xvda`.
    pub dev: Option<String>,
    /// Id of the driver domain that serves it.
    pub backend: Option<u16>,
    /// The frontend's xenbus state; 4 is connected.
    pub state: Option<u32>,
    /// The backend's.
    pub backend_state: Option<u32>,
    /// The frontend's event channel and ring reference of each queue.
    pub queues: Vec<Queue>,
    /// The backend's directory.
    pub path: String,
    /// What of the backend's disk it is.
    pub volume: Option<String>,
    /// `w` or `r`.
    pub mode: Option<String>,
    /// `raw` or `qcow2`.
    pub format: Option<String>,
    /// Where unwritten parts come from.
    pub backing: Option<String>,
    /// Its size in sectors of 512 bytes.
    pub sectors: Option<u64>,
    /// Bytes of its own sectors.
    pub sector_size: Option<u32>,
}

/// A ring of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Queue {
    /// The guest's port.
    pub event_channel: Option<u32>,
    /// The first page of the ring.
    pub ring_ref: Option<u32>,
}

/// The disks of the guest `wanted`, or of all.
///
/// # Errors
/// There is no such domain, or the platform does not answer.
pub fn list(client: &mut Client, wanted: Option<&str>) -> Result<Vec<Vbd>, ClientError> {
    let Response::List(domains) = client.request(Request::List)? else {
        return Err(ClientError::NotUnderstood);
    };
    if let Some(name) = wanted
        && domains.iter().all(|domain| domain.name != name)
    {
        let known = domains.iter().map(|domain| domain.name.as_str());
        let nearest = control::names::nearest(name, known).map(str::to_owned);
        return Err(ClientError::Refused(Failure::UnknownName { name: name.into(), nearest }));
    }
    let mut vbds = Vec::new();
    for domain in domains.iter().filter(|domain| wanted.is_none_or(|name| name == domain.name)) {
        let root = format!("/local/domain/{}/device/vbd", domain.domid);
        let mut numbers: Vec<u32> =
            children(client, &root)?.iter().filter_map(|name| name.parse().ok()).collect();
        numbers.sort_unstable();
        for number in numbers {
            vbds.push(read(client, &domain.name, &root, number)?);
        }
    }
    Ok(vbds)
}

fn read(client: &mut Client, domain: &str, root: &str, number: u32) -> Result<Vbd, ClientError> {
    let front = format!("{root}/{number}");
    let path = value(client, &format!("{front}/backend"))?.unwrap_or_default();
    let mut key = |name: &str| match path.as_str() {
        "" => Ok(None),
        path => value(client, &format!("{path}/{name}")),
    };
    let (dev, volume, mode) = (key("dev")?, key("params")?, key("mode")?);
    let (format, backing) = (key("format")?, key("backing")?);
    let (sectors, sector_size) = (key("sectors")?, key("sector-size")?);
    let backend_state = key("state")?;
    Ok(Vbd {
        domain: domain.into(),
        number,
        dev,
        backend: parsed(value(client, &format!("{front}/backend-id"))?),
        state: parsed(value(client, &format!("{front}/state"))?),
        backend_state: parsed(backend_state),
        queues: queues(client, &front)?,
        path,
        volume,
        mode,
        format,
        backing,
        sectors: parsed(sectors),
        sector_size: parsed(sector_size),
    })
}

/// The rings: one in the frontend's directory itself, or several in directories below it. Rings
/// of several pages number their references.
fn queues(client: &mut Client, front: &str) -> Result<Vec<Queue>, ClientError> {
    let count = parsed(value(client, &format!("{front}/multi-queue-num-queues"))?).unwrap_or(1_u32);
    let mut queues = Vec::new();
    // Whatever a guest has written there.
    for index in 0..count.min(64) {
        let place = if count > 1 { format!("{front}/queue-{index}") } else { front.to_owned() };
        let mut key = |name: &str| value(client, &format!("{place}/{name}"));
        let ring_ref = match key("ring-ref")? {
            Some(one) => Some(one),
            None => key("ring-ref0")?,
        };
        let event_channel = key("event-channel")?;
        if ring_ref.is_some() || event_channel.is_some() {
            queues.push(Queue { event_channel: parsed(event_channel), ring_ref: parsed(ring_ref) });
        }
    }
    Ok(queues)
}

fn parsed<T: std::str::FromStr>(text: Option<String>) -> Option<T> {
    text.and_then(|text| text.parse().ok())
}

/// A node's value and children; `None` when there is no such node.
fn node(client: &mut Client, path: &str) -> Result<Option<(String, Vec<String>)>, ClientError> {
    match client.request(Request::XenstoreLs(path.to_owned())) {
        Ok(Response::Node { value, children, .. }) => {
            Ok(Some((String::from_utf8_lossy(&value).into_owned(), children)))
        }
        Ok(_) => Err(ClientError::NotUnderstood),
        Err(ClientError::Refused(Failure::Store { .. })) => Ok(None),
        Err(error) => Err(error),
    }
}

fn value(client: &mut Client, path: &str) -> Result<Option<String>, ClientError> {
    Ok(node(client, path)?.map(|(value, _)| value))
}

fn children(client: &mut Client, path: &str) -> Result<Vec<String>, ClientError> {
    Ok(node(client, path)?.map(|(_, children)| children).unwrap_or_default())
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// `axl vbd-list`.
#[must_use]
pub fn text(vbds: &[Vbd]) -> String {
    let mut text = format!(
        "{:<16} {:>6} {:<5} {:>3} {:>6} {:>5} {:>6} {:>8} {:<4} {:<24} {}\n",
        "Domain",
        "Vdev",
        "Dev",
        "BE",
        "handle",
        "state",
        "evt-ch",
        "ring-ref",
        "Mode",
        "Volume",
        "BE-path"
    );
    for vbd in vbds {
        let first = vbd.queues.first();
        let mut volume = or_dash(vbd.volume.as_ref());
        if vbd.format.as_deref() == Some("qcow2") {
            volume += " (cow)";
        }
        let _ = writeln!(
            text,
            "{:<16} {:>6} {:<5} {:>3} {:>6} {:>5} {:>6} {:>8} {:<4} {:<24} {}",
            vbd.domain,
            vbd.number,
            or_dash(vbd.dev.as_ref()),
            or_dash(vbd.backend),
            vbd.number,
            or_dash(vbd.state),
            or_dash(first.and_then(|queue| queue.event_channel)),
            or_dash(first.and_then(|queue| queue.ring_ref)),
            or_dash(vbd.mode.as_ref()),
            volume,
            vbd.path
        );
    }
    crate::show::printable(&text)
}

/// `axl vbd-list --json`.
#[must_use]
pub fn json(vbds: &[Vbd]) -> Value {
    let queue =
        |queue: &Queue| json!({ "event_channel": queue.event_channel, "ring_ref": queue.ring_ref });
    let vbd = |vbd: &Vbd| {
        json!({
            "domain": vbd.domain,
            "vdev": vbd.number,
            "dev": vbd.dev,
            "backend_id": vbd.backend,
            "state": vbd.state,
            "backend_state": vbd.backend_state,
            "queues": vbd.queues.iter().map(queue).collect::<Vec<_>>(),
            "backend_path": vbd.path,
            "volume": vbd.volume,
            "mode": vbd.mode,
            "format": vbd.format,
            "backing": vbd.backing,
            "sectors": vbd.sectors,
            "sector_size": vbd.sector_size,
        })
    };
    vbds.iter().map(vbd).collect()
}

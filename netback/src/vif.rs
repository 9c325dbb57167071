//! One vif, and what its two ends in the store ask of it ([`xenbus::backend`]).

use crate::groups::Groups;
use crate::link::{Link, Published, PublishedQueue, Takes};
use crate::plane::Station;
use crate::preserved::{MAX_QUEUES, VifId};
use crate::switch::{Addresses, Mac, Port, is_group};
use crate::{Env, Netback, frontend_token};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use domain_api::{Errno, EventPort};
use xenbus::backend::{self, Attached, End, Forget, Serve};
use xenbus::device::{self, Device, DeviceKind};
use xenbus::{Nodes, Store};

/// Features, as Linux's netfront reads them before the backend's state is 2. What is not
/// listed is not offered.
const FEATURES: [(&str, &str); 9] = [
    ("feature-rx-copy", "1"),
    ("feature-rx-flip", "0"),
    ("feature-split-event-channels", "1"),
    ("feature-sg", "1"),
    ("feature-gso-tcpv4", "1"),
    ("feature-gso-tcpv6", "1"),
    ("feature-ipv6-csum-offload", "1"),
    ("feature-multicast-control", "1"),
    ("feature-dynamic-multicast-control", "1"),
];
/// Besides them: how many queues a frontend may have.
const MOST_QUEUES: &str = "multi-queue-max-queues";
/// The frontend's wish for a multicast filter; it may change at any time.
const FILTER: &str = "request-multicast-control";

/// Keys of the frontend that are watched.
const WATCHED: [&str; 2] = ["state", FILTER];

/// What is known of a vif.
pub struct Vif {
    end: End,
    /// Its place in the data path's table.
    pub place: usize,
    /// Its address, when it was read.
    pub mac: Option<Mac>,
}

/// Whether a key of the backend's directory says what to do. The others are our own.
pub fn matters(key: Option<&str>) -> bool {
    matches!(key, None | Some("state" | "online" | "frontend" | "mac"))
}

impl Netback {
    /// Looks at both ends of a vif, and acts until nothing is left to do.
    pub(crate) fn refresh<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VifId,
    ) -> Result<(), Errno> {
        if !self.vifs.contains_key(&id) && !self.add(store, id)? {
            return Ok(());
        }
        if !backend::refresh(&mut Served { netback: self, env, id }, store)? {
            self.remove(env, store, id);
        }
        Ok(())
    }

    /// Closes a vif for a reason that its owner should read.
    pub(crate) fn give_up<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VifId,
        message: &str,
    ) -> Result<(), Errno> {
        backend::give_up(&mut Served { netback: self, env, id }, store, message)
    }

    /// Starts to know a vif. False when its directory is not complete yet.
    fn add<S: Store>(&mut self, store: &mut S, id: VifId) -> Result<bool, Errno> {
        let device = Device {
            kind: DeviceKind::Vif,
            backend: self.own,
            frontend: id.domain,
            index: id.handle,
        };
        let Some(end) = End::open(store, device, &WATCHED, &frontend_token(id))? else {
            return Ok(false);
        };
        let stations = &mut self.plane.stations;
        let free = stations.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            stations.push(None);
            stations.len() - 1
        });
        let (mac, addresses) = ([0; 6], Addresses::Exact);
        stations[place] = Some(Station { domain: id.domain, mac, addresses, link: None });
        self.vifs.insert(id, Vif { end, place, mac: None });
        Ok(true)
    }

    /// Forgets a vif whose directory is gone.
    pub(crate) fn remove<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S, id: VifId) {
        Served { netback: self, env, id }.disconnect(Forget::Yes);
        self.preserved.release(id);
        let Some(vif) = self.vifs.remove(&id) else { return };
        self.plane.stations[vif.place] = None;
        vif.end.leave(store, &WATCHED, &frontend_token(id));
    }

    /// Looks whether a connected frontend wants a multicast filter.
    pub(crate) fn refresh_groups<S: Store>(
        &mut self,
        store: &mut S,
        id: VifId,
    ) -> Result<(), Errno> {
        let Some(vif) = self.vifs.get(&id) else { return Ok(()) };
        let station = self.plane.stations[vif.place].as_mut();
        if let Some(link) = station.and_then(|station| station.link.as_mut()) {
            link.groups.restrict(filters(store, vif.end.frontend()));
        }
        Ok(())
    }
}

/// A vif, while its ends are looked at.
struct Served<'a, E> {
    netback: &'a mut Netback,
    env: &'a mut E,
    id: VifId,
}

impl<E: Env> Served<'_, E> {
    /// Lets go of the rings, if they are attached.
    fn disconnect(&mut self, forget: Forget) {
        let Self { netback, env, id } = self;
        if let Some(vif) = netback.vifs.get_mut(id) {
            let place = vif.place;
            let station = netback.plane.stations[place].as_mut();
            if let Some(link) = station.and_then(|station| station.link.take()) {
                netback.ports.retain(|_, other| other.0 != place);
                let stats = link.detach(*env, netback.plane.deliveries.pool());
                if vif.end.may_log(env.now_ns()) {
                    log::info!("{id}: disconnected, {stats:?}");
                }
            }
            netback.plane.switch.detach(Port::Vif(place));
        }
        if forget == Forget::Yes {
            netback.preserved.forget(*id);
        }
    }
}

impl<E: Env, S: Store> Serve<S> for Served<'_, E> {
    fn end(&mut self) -> Option<&mut End> {
        self.netback.vifs.get_mut(&self.id).map(|vif| &mut vif.end)
    }

    fn now_ns(&self) -> u64 {
        self.env.now_ns()
    }

    fn is_attached(&self) -> bool {
        let vif = self.netback.vifs.get(&self.id);
        let station = vif.and_then(|vif| self.netback.plane.stations[vif.place].as_ref());
        station.is_some_and(|station| station.link.is_some())
    }

    fn is_draining(&self) -> bool {
        false
    }

    fn offer(&mut self, store: &mut S) -> Result<(), Errno> {
        let Some(vif) = self.netback.vifs.get(&self.id) else { return Ok(()) };
        let directory = vif.end.directory();
        for (key, value) in FEATURES {
            store.write(&format!("{directory}/{key}"), value.as_bytes())?;
        }
        let queues = self.netback.preserved.queues(self.netback.listed.max(1));
        device::write(store, &directory, MOST_QUEUES, queues)
    }

    fn attach(&mut self, store: &mut S, taken_over: bool) -> Result<Attached, Errno> {
        let Self { netback, env, id } = self;
        let Some(vif) = netback.vifs.get_mut(id) else { return Ok(Attached::NotYet) };
        let (place, frontend) = (vif.place, vif.end.frontend());
        let groups =
            if taken_over { Groups::lost() } else { Groups::new(filters(store, frontend)) };
        netback.links += 1;
        let opened = read_own(store, &vif.end.directory())
            .and_then(|own| Ok((own, read_published(store, frontend)?)))
            .and_then(|(own, published)| {
                let preserved = &mut netback.preserved;
                let link = Link::attach(*env, preserved, *id, &published, groups, netback.links)?;
                Ok((own, link))
            });
        let ((mac, addresses), link) = match opened {
            Ok(opened) => opened,
            Err(message) => return Ok(Attached::Refused(message)),
        };
        let plane = &mut netback.plane;
        if !plane.switch.pin(mac, Port::Vif(place)) {
            link.detach(*env, plane.deliveries.pool());
            return Ok(Attached::Refused(format!("address {} is another vif's", text_of(mac))));
        }
        plane.switch.attach(Port::Vif(place), addresses);
        for (number, queue) in link.queues.iter().enumerate() {
            netback.ports.insert(queue.tx_port, (place, number));
            netback.ports.insert(queue.rx_port, (place, number));
        }
        vif.mac = Some(mac);
        if vif.end.may_log(env.now_ns()) {
            let how = if taken_over { "taken over" } else { "connected" };
            let (mac, queues, replayed) = (text_of(mac), link.queues.len(), link.replayed());
            log::info!("{id}: {how}, {mac}, queues: {queues}, requests replayed: {replayed}");
        }
        plane.stations[place] =
            Some(Station { domain: id.domain, mac, addresses, link: Some(link) });
        Ok(Attached::Yes)
    }

    fn detach(&mut self, forget: Forget) {
        self.disconnect(forget);
    }

    fn release(&mut self) -> bool {
        true
    }
}

/// The toolstack's keys in our own directory.
fn read_own<S: Nodes>(store: &mut S, directory: &str) -> Result<(Mac, Addresses), String> {
    let mac = store
        .read_string(&format!("{directory}/mac"))
        .ok()
        .and_then(|text| parse_mac(&text))
        .ok_or_else(|| "the backend's key `mac` is not an address".to_string())?;
    // Our own key: lets a guest that bridges use addresses besides its own.
    let addresses = match device::read_or(store, directory, "antispoof", 1_u32) {
        Ok(0) => Addresses::Learned,
        _ => Addresses::Exact,
    };
    Ok((mac, addresses))
}

/// Whether the frontend wants a multicast filter.
fn filters<S: Nodes>(store: &mut S, frontend: &str) -> bool {
    device::has_feature(store, frontend, FILTER) == Ok(true)
}

/// What the frontend published.
fn read_published<S: Nodes>(store: &mut S, frontend: &str) -> Result<Published, String> {
    let copying = device::has_feature(store, frontend, "request-rx-copy");
    if copying != Ok(true) {
        return Err("the frontend does not ask for copying receive (request-rx-copy)".to_string());
    }
    let count = device::read_or(store, frontend, "multi-queue-num-queues", 1_u16)
        .map_err(|errno| format!("the frontend's key `multi-queue-num-queues`: {errno}"))?;
    if !(1..=MAX_QUEUES).contains(&count) {
        return Err(format!("the frontend wants {count} queues"));
    }
    let mut queues = Vec::with_capacity(count.into());
    for number in 0..count {
        // One queue has its keys where they were before there could be several.
        let directory =
            if count == 1 { frontend.to_string() } else { format!("{frontend}/queue-{number}") };
        queues.push(read_queue(store, &directory)?);
    }
    Ok(Published { queues, takes: read_takes(store, frontend) })
}

/// What the frontend published of a queue.
fn read_queue<S: Nodes>(store: &mut S, directory: &str) -> Result<PublishedQueue, String> {
    let key =
        |name: &'static str| move |errno: Errno| format!("the frontend's key `{name}`: {errno}");
    let tx_ring =
        device::read_grant(store, directory, "tx-ring-ref").map_err(key("tx-ring-ref"))?;
    let rx_ring =
        device::read_grant(store, directory, "rx-ring-ref").map_err(key("rx-ring-ref"))?;
    let port = |store: &mut S, name: &'static str| -> Result<EventPort, String> {
        device::read_port(store, directory, name).map_err(key(name))
    };
    match port(store, "event-channel-tx") {
        Ok(tx_port) => {
            let rx_port = Some(port(store, "event-channel-rx")?);
            Ok(PublishedQueue { tx_ring, rx_ring, tx_port, rx_port })
        }
        Err(_) => {
            let tx_port = port(store, "event-channel")?;
            Ok(PublishedQueue { tx_ring, rx_ring, tx_port, rx_port: None })
        }
    }
}

/// What the frontend takes. Blank checksums over IPv4 unless it says otherwise; a long packet has
/// a blank checksum, and comes in several slots.
fn read_takes<S: Nodes>(store: &mut S, frontend: &str) -> Takes {
    let mut has = |key| device::has_feature(store, frontend, key) == Ok(true);
    let (blank_v4, blank_v6) = (!has("feature-no-csum-offload"), has("feature-ipv6-csum-offload"));
    let several = has("feature-sg");
    Takes {
        blank_v4,
        blank_v6,
        long_v4: blank_v4 && several && has("feature-gso-tcpv4"),
        long_v6: blank_v6 && several && has("feature-gso-tcpv6"),
    }
}

/// `aa:bb:cc:dd:ee:ff`, one station's.
fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut bytes = text.split(':');
    for byte in &mut mac {
        let digits = bytes.next().filter(|digits| (1..=2).contains(&digits.len()))?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    (bytes.next().is_none() && !is_group(mac) && mac != [0; 6]).then_some(mac)
}

fn text_of(mac: Mac) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed_strictly() {
        assert_eq!(parse_mac("00:16:3e:00:aB:01"), Some([0, 0x16, 0x3e, 0, 0xab, 1]));
        for bad in [
            "",
            "00:16:3e:00:ab",
            "00:16:3e:00:ab:01:02",
            "00:16:3e:00:ab:001",
            "01:16:3e:00:ab:01",
            "00:00:00:00:00:00",
            "00-16-3e-00-ab-01",
            "+1:16:3e:00:ab:0z",
        ] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}

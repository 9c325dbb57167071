//! One vif and its two ends in the store.
//!
//! What is to be done follows from the states of both ends, by the same table whether this
//! incarnation just started or has served the vif for hours ([`xenbus::takeover()`]); what
//! differs is only whether the rings are attached already. Every step is safe to repeat: our own
//! writes come back to us as events.

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
use xenbus::device::{self, Device, DeviceKind};
use xenbus::{Nodes, Store, Takeover, XenbusState, takeover};

/// Steps that one event can cause; more would be a circle.
const MOST_STEPS: usize = 4;
/// Log lines that a vif may cause in [`LOG_PERIOD_NS`].
const MOST_LINES: u32 = 16;
const LOG_PERIOD_NS: u64 = 10_000_000_000;

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

/// What is known of a vif.
pub struct Vif {
    device: Device,
    /// Its place in the data path's table.
    pub place: usize,
    /// The frontend's directory.
    frontend: String,
    /// Its address, when it was read.
    pub mac: Option<Mac>,
    /// The features are in the store and the state is 2, by this incarnation's hand.
    advertised: bool,
    lines: u32,
    lines_since_ns: u64,
}

/// Whether a key of the backend's directory says what to do. The others are our own.
pub fn matters(key: Option<&str>) -> bool {
    matches!(key, None | Some("state" | "online" | "frontend" | "mac"))
}

impl Vif {
    fn backend(&self) -> String {
        self.device.backend_path()
    }

    /// Whether one more line may be logged: what frontends do must not fill the log.
    fn may_log(&mut self, now_ns: u64) -> bool {
        if now_ns.saturating_sub(self.lines_since_ns) >= LOG_PERIOD_NS {
            (self.lines, self.lines_since_ns) = (0, now_ns);
        }
        self.lines += 1;
        self.lines <= MOST_LINES
    }
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
        for _ in 0..MOST_STEPS {
            let Some(vif) = self.vifs.get(&id) else { return Ok(()) };
            let (backend_dir, frontend_dir) = (vif.backend(), vif.frontend.clone());
            if store.read_optional(&format!("{backend_dir}/frontend"))?.is_none() {
                self.remove(env, store, id);
                return Ok(());
            }
            let backend = device::state(store, &backend_dir)?;
            let frontend = device::state(store, &frontend_dir)?;
            if !self.step(env, store, id, backend, frontend)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// One step. True when a state has changed, so that another step may follow.
    fn step<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VifId,
        backend: XenbusState,
        frontend: XenbusState,
    ) -> Result<bool, Errno> {
        let attached = self.is_attached(id);
        match takeover(DeviceKind::Vif, backend, frontend) {
            Takeover::Attach if attached => Ok(false),
            Takeover::Attach => self.connect(env, store, id, backend).map(|()| false),
            Takeover::Connect => {
                self.disconnect(env, id, Forget::No);
                self.connect(env, store, id, backend).map(|()| true)
            }
            Takeover::Advertise if self.is_advertised(id) && backend == XenbusState::INIT_WAIT => {
                Ok(false)
            }
            Takeover::Advertise | Takeover::StartOver => {
                self.disconnect(env, id, Forget::Yes);
                self.advertise(env, store, id).map(|()| true)
            }
            Takeover::FollowClosing => {
                self.disconnect(env, id, Forget::Yes);
                let closed = frontend == XenbusState::UNKNOWN;
                let next = if closed { XenbusState::CLOSED } else { XenbusState::CLOSING };
                self.switch_state(env, store, id, next).map(|()| backend != next)
            }
            Takeover::Release => self.close(env, store, id).map(|()| false),
            // The frontend is gone without a word: its domain was destroyed.
            Takeover::Wait
                if frontend == XenbusState::UNKNOWN && backend == XenbusState::CONNECTED =>
            {
                self.close(env, store, id).map(|()| false)
            }
            Takeover::Wait => Ok(false),
        }
    }

    /// Starts to know a vif. False when its directory is not complete yet.
    fn add<S: Store>(&mut self, store: &mut S, id: VifId) -> Result<bool, Errno> {
        let device = Device {
            kind: DeviceKind::Vif,
            backend: self.own,
            frontend: id.domain,
            index: id.handle,
        };
        let directory = device.backend_path();
        let Some(frontend) = store.read_optional(&format!("{directory}/frontend"))? else {
            return Ok(false);
        };
        let free = self.plane.stations.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            self.plane.stations.push(None);
            self.plane.stations.len() - 1
        });
        self.plane.stations[place] = Some(Station {
            domain: id.domain,
            mac: [0; 6],
            addresses: Addresses::Exact,
            link: None,
        });
        for key in ["state", FILTER] {
            match store.watch(&format!("{frontend}/{key}"), &frontend_token(id)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => {
                    self.plane.stations[place] = None;
                    return Err(errno);
                }
            }
        }
        let vif = Vif {
            device,
            place,
            frontend,
            mac: None,
            advertised: false,
            lines: 0,
            lines_since_ns: 0,
        };
        self.vifs.insert(id, vif);
        Ok(true)
    }

    /// Forgets a vif whose directory is gone.
    pub(crate) fn remove<E: Env, S: Store>(&mut self, env: &mut E, store: &mut S, id: VifId) {
        self.disconnect(env, id, Forget::Yes);
        self.preserved.release(id);
        let Some(vif) = self.vifs.remove(&id) else { return };
        self.plane.stations[vif.place] = None;
        // The watch may be gone with the connection; there is nothing left to end then.
        for key in ["state", FILTER] {
            let _ = store.unwatch(&format!("{}/{key}", vif.frontend), &frontend_token(id));
        }
        log::info!("{id}: removed");
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
            link.groups.restrict(filters(store, &vif.frontend));
        }
        Ok(())
    }

    fn is_attached(&self, id: VifId) -> bool {
        let place = self.vifs.get(&id).map(|vif| vif.place);
        place.is_some_and(|place| {
            self.plane.stations[place].as_ref().is_some_and(|station| station.link.is_some())
        })
    }

    fn is_advertised(&self, id: VifId) -> bool {
        self.vifs.get(&id).is_some_and(|vif| vif.advertised)
    }

    /// Writes the features, then state 2.
    fn advertise<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VifId,
    ) -> Result<(), Errno> {
        let Some(vif) = self.vifs.get_mut(&id) else { return Ok(()) };
        let directory = vif.backend();
        for (key, value) in FEATURES {
            store.write(&format!("{directory}/{key}"), value.as_bytes())?;
        }
        let queues = self.preserved.queues(self.listed.max(1));
        device::write(store, &directory, MOST_QUEUES, queues)?;
        vif.advertised = true;
        let error = error_node(id);
        if store.read_optional(&error)?.is_some() {
            store.rm(&error)?;
        }
        self.switch_state(env, store, id, XenbusState::INIT_WAIT)
    }

    /// Attaches to the rings; state 4 unless it is that already.
    fn connect<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VifId,
        backend: XenbusState,
    ) -> Result<(), Errno> {
        let Some(vif) = self.vifs.get_mut(&id) else { return Ok(()) };
        // Once connected, another round of advertising is a new one.
        vif.advertised = false;
        let (place, frontend, directory) = (vif.place, vif.frontend.clone(), vif.backend());
        let takeover = backend == XenbusState::CONNECTED;
        let groups = if takeover { Groups::lost() } else { Groups::new(filters(store, &frontend)) };
        self.links += 1;
        let opened = read_own(store, &directory)
            .and_then(|own| Ok((own, read_published(store, &frontend)?)))
            .and_then(|(own, published)| {
                let preserved = &mut self.preserved;
                let link = Link::attach(env, preserved, id, &published, groups, self.links)?;
                Ok((own, link))
            });
        let ((mac, addresses), link) = match opened {
            Ok(opened) => opened,
            Err(message) => return self.give_up(env, store, id, &message),
        };
        if !self.plane.switch.pin(mac, Port::Vif(place)) {
            link.detach(env, self.plane.deliveries.pool());
            let message = format!("address {} is another vif's", text_of(mac));
            return self.give_up(env, store, id, &message);
        }
        self.plane.switch.attach(Port::Vif(place), addresses);
        for (number, queue) in link.queues.iter().enumerate() {
            self.ports.insert(queue.tx_port, (place, number));
            self.ports.insert(queue.rx_port, (place, number));
        }
        let (replayed, queues) = (link.replayed(), link.queues.len());
        if let Some(vif) = self.vifs.get_mut(&id) {
            vif.mac = Some(mac);
            if vif.may_log(env.now_ns()) {
                let how = if takeover { "taken over" } else { "connected" };
                let mac = text_of(mac);
                log::info!("{id}: {how}, {mac}, queues: {queues}, requests replayed: {replayed}");
            }
        }
        self.plane.stations[place] =
            Some(Station { domain: id.domain, mac, addresses, link: Some(link) });
        if backend != XenbusState::CONNECTED {
            self.switch_state(env, store, id, XenbusState::CONNECTED)?;
        }
        Ok(())
    }

    /// Lets go of the rings, if they are attached.
    fn disconnect<E: Env>(&mut self, env: &mut E, id: VifId, forget: Forget) {
        if let Some(vif) = self.vifs.get_mut(&id) {
            let place = vif.place;
            let station = self.plane.stations[place].as_mut();
            if let Some(link) = station.and_then(|station| station.link.take()) {
                self.ports.retain(|_, other| other.0 != place);
                let stats = link.detach(env, self.plane.deliveries.pool());
                if vif.may_log(env.now_ns()) {
                    log::info!("{id}: disconnected, {stats:?}");
                }
            }
            self.plane.switch.detach(Port::Vif(place));
        }
        if forget == Forget::Yes {
            self.preserved.forget(id);
        }
    }

    /// The frontend is closed: state 6, and the directory goes if the toolstack wants that.
    fn close<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VifId,
    ) -> Result<(), Errno> {
        self.disconnect(env, id, Forget::Yes);
        self.switch_state(env, store, id, XenbusState::CLOSED)?;
        let Some(vif) = self.vifs.get_mut(&id) else { return Ok(()) };
        vif.advertised = false;
        let directory = vif.backend();
        if device::read_or(store, &directory, "online", 1_u32) == Ok(0) {
            match store.rm(&directory) {
                // Where the directory is the toolstack's, it removes it itself.
                Ok(()) | Err(Errno::EACCES | Errno::ENOENT) => {}
                Err(errno) => return Err(errno),
            }
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
        self.disconnect(env, id, Forget::Yes);
        store.write(&error_node(id), message.as_bytes())?;
        if self.vifs.get_mut(&id).is_some_and(|vif| vif.may_log(env.now_ns())) {
            log::warn!("{id}: {message}");
        }
        self.switch_state(env, store, id, XenbusState::CLOSING)
    }

    fn switch_state<E: Env, S: Store>(
        &mut self,
        env: &mut E,
        store: &mut S,
        id: VifId,
        state: XenbusState,
    ) -> Result<(), Errno> {
        let Some(vif) = self.vifs.get_mut(&id) else { return Ok(()) };
        let directory = vif.backend();
        if device::state(store, &directory)? != state {
            device::write(store, &directory, "state", state.0)?;
            if vif.may_log(env.now_ns()) {
                log::debug!("{id}: state {}", state.0);
            }
        }
        Ok(())
    }
}

/// Whether what is in flight may be taken up again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Forget {
    Yes,
    No,
}

/// Where the reason for a vif's end is written, as Linux does it (`xenbus_dev_error`).
fn error_node(id: VifId) -> String {
    format!("error/backend/vif/{}/{}/error", id.domain.0, id.handle)
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

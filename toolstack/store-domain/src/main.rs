//! The store domain: xenstore, on its own.
//!
//! It has no rights. It maps the pages that other domains granted to it, binds to the ports that
//! they left for it, and answers; all of that is [`xenstore::Service`]. Its configuration is four
//! bytes: the control domain's xenstore port, as a little-endian `u32`. The control domain
//! introduces everybody else.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

use unikernel::domain_api::{DomainId, EventPort};
use unikernel::{Domain, log};
use xenstore::{Server, Service};

/// Who introduces the others.
const CONTROL: DomainId = DomainId(0);

unikernel::main!(run);

fn run(domain: Domain) {
    let config =
        domain.config().try_into().expect("the configuration is the control domain's port");
    let port = EventPort(u32::from_le_bytes(config));
    let mut service = Service::new(Server::default(), domain.clone());
    service.connect(CONTROL, port).expect("the control domain has granted its ring");
    log::info!("serving {CONTROL}");
    loop {
        // Also while there is work: a domain that always asks must not drown the others' events.
        for port in domain.poll() {
            service.event(port);
        }
        if !service.serve() {
            for port in domain.wait(None) {
                service.event(port);
            }
        }
    }
}

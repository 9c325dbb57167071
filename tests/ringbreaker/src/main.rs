//! Breaks its rings in every way that comes to mind, and says on its console how the backends took it.
//!
//! Each life connects to its network interface and its disk as any guest does, sees that both serve
//! it (an answer from the network, data that come back from the disk), and then does to each of them,
//! and to the store, one thing that no correct guest does ([`net`], [`disk`], [`store`]): another one
//! in every life, chosen by `seed=N` of `extra` and the incarnation. Where the backend owes an answer
//! the life waits for it: a broken connection is closed, a bad request is answered and the next good
//! one served. Then it ends, by a panic, in good order, with everything in flight, or by breaking its
//! ring to the store; so the domain wants `on_crash` and `on_poweroff` to be `"restart"`.
//!
//! The frontends here are its own: those of `frontends` cannot be made to misbehave. A life that went
//! as it must says `ringbreaker: did …`; `ringbreaker: FAILED: …` is what a backend did wrong.

#![no_std]
#![no_main]

extern crate alloc;

mod disk;
mod life;
mod memory;
mod net;
mod ring;
mod store;
mod vbd;
mod vif;

use alloc::string::String;
use life::{Attack, Failure, Life, Split, judge};
use unikernel::{Domain, println};
use vbd::Vbd;
use vif::Vif;

unikernel::main!(run);

fn run(domain: Domain) {
    let mut life = Life::new(domain);
    let number = life.domain.incarnation();
    let (mut vif, mut vbd) = match connect(&mut life) {
        Ok(devices) => devices,
        Err(failure) => fail(&life, &failure),
    };
    match misbehave(&mut life, &mut vif, &mut vbd) {
        Ok(said) => println!("ringbreaker: did {said} in life {number}"),
        Err(failure) => fail(&life, &failure),
    }
    end(&mut life, &mut vif, &mut vbd);
}

/// Says what is wrong, and stops: whoever looks finds the domain as it was.
fn fail(life: &Life, failure: &Failure) -> ! {
    println!("ringbreaker: FAILED: life {}: {failure}", life.domain.incarnation());
    loop {
        let _ = life.domain.wait(None);
    }
}

/// Both devices, after they did what they are for.
fn connect(life: &mut Life) -> Result<(Vif, Vbd), Failure> {
    let (mut vif, mut vbd) = (Vif::new(life)?, Vbd::new(life)?);
    vif.connect(life)?;
    vbd.connect(life)?;
    vif.work(life)?;
    vbd.work(life)?;
    Ok((vif, vbd))
}

/// The attacks of this life.
fn misbehave(life: &mut Life, vif: &mut Vif, vbd: &mut Vbd) -> Result<String, Failure> {
    let turn = life.turn();
    let net: &Attack<Vif> = &net::ATTACKS[turn % net::ATTACKS.len()];
    let disk: &Attack<Vbd> = &disk::ATTACKS[turn % disk::ATTACKS.len()];
    let store = &store::ATTACKS[turn % store::ATTACKS.len()];
    judge(life, vif, net)?;
    judge(life, vbd, disk)?;
    (store.run)(life).map_err(|failure| alloc::format!("store, {}: {failure}", store.name))?;
    Ok(alloc::format!("`{}`, `{}` and `{}`", net.name, disk.name, store.name))
}

fn end(life: &mut Life, vif: &mut Vif, vbd: &mut Vbd) {
    match life.random.below(4) {
        0 => {}
        1 => panic!("as intended"),
        2 => {
            // Whatever the rings hold now, somebody must clear it away.
            net::fill(life, vif);
            disk::fill(life, vbd);
            panic!("as intended, in the middle of it");
        }
        _ => {
            memory::break_store_ring(life);
            panic!("as intended, without a store");
        }
    }
}

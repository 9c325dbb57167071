//! Whatever dies, and whenever.

use crate::disk::{Dice, GEOMETRY, Sparse};
use crate::host::{Action, Host, Shape, load, new_backing};
use crate::qemu;
use domain_api::disk::{DiskError, Geometry, Operation};
use std::sync::Arc;

const KIB: u64 = 1024;

/// A disk that needs three L2 tables.
pub const SMALL: Shape = Shape {
    size: 5 * 1024 * KIB,
    cluster_bits: 12,
    extent: 8 * 1024 * KIB,
    backing: None,
    geometry: GEOMETRY,
    pages: 20,
};

fn small_load() -> Vec<Action> {
    let action = |operation, sector, sectors| Action { operation, sector, sectors };
    vec![
        action(Operation::Write, 3, 2),
        action(Operation::Write, 4090, 20),
        action(Operation::Read, 0, 16),
        action(Operation::Write, 4096, 4),
        action(Operation::Discard, 4, 80),
        action(Operation::Write, 8, 8),
        action(Operation::WriteZeroes, 4092, 30),
        action(Operation::Flush, 0, 0),
        action(Operation::Write, 9000, 3),
        action(Operation::Write, 1, 30),
    ]
}

/// Runs a load and kills the driver domain after `at` requests below. True: it came so far.
fn killed_at(backing: Arc<Sparse>, shape: Shape, seed: u64, at: u64) -> bool {
    let mut host = Host::over(backing, shape, seed);
    host.start_well();
    let mut actions = small_load();
    actions.reverse();
    while host.disks.steps < at {
        if actions.is_empty() && host.in_flight() == 0 && host.disks.pending.is_empty() {
            return false;
        }
        host.step(&mut actions, 4);
    }
    host.driver_dies();
    host.start_well();
    let report = host.disks.image.check();
    assert!(report.is_clean(), "seed {seed}, killed at {at}: {report:?}");
    host.replay();
    actions.reverse();
    host.run(actions, 4);
    let report = host.disks.image.check();
    assert!(report.is_clean(), "seed {seed}, killed at {at}, at the end: {report:?}");
    assert_eq!(host.errors, []);
    host.read_touched();
    true
}

fn every_instant(shape: Shape, seeds: u64) {
    let backing = Arc::new(new_backing(shape.backing.unwrap_or(0)));
    for seed in 0..seeds {
        let is_there = |&at: &u64| killed_at(backing.clone(), shape, seed, at);
        let steps = (0..).take_while(is_there).count();
        assert!(steps > 40, "only {steps} steps");
    }
}

#[test]
fn a_kill_at_any_instant_loses_nothing() {
    every_instant(SMALL, 3);
}

#[test]
fn a_kill_at_any_instant_loses_nothing_of_an_overlay() {
    every_instant(Shape { backing: Some(3 * 1024 * KIB + 512 * 5), ..SMALL }, 3);
}

#[test]
fn a_kill_at_any_instant_loses_nothing_without_a_volatile_cache() {
    let geometry = Geometry {
        volatile_cache: false,
        max_write_zeroes_sectors: 16,
        queue_depth: 3,
        ..GEOMETRY
    };
    every_instant(Shape { geometry, ..SMALL }, 3);
}

/// A shape that a seed stands for.
fn any_shape(dice: &mut Dice) -> Shape {
    let cluster_bits = [12, 12, 13, 16][dice.below(4) as usize];
    let sector_size = [512, 512, 4096][dice.below(3) as usize];
    let size = (64 + dice.below(4096)) * 4096;
    let backing = dice.one_in(2).then(|| dice.below(size / 4096 + 64) * 4096 + 4096);
    let geometry = Geometry {
        sector_size,
        volatile_cache: dice.one_in(2),
        max_write_zeroes_sectors: [0, 8, 1 << 16][dice.below(3) as usize],
        max_sectors: [8, 64, 256][dice.below(3) as usize],
        max_buffers: [9, 33][dice.below(2) as usize],
        queue_depth: [1, 2, 8, 64][dice.below(4) as usize],
        ..GEOMETRY
    };
    let extent = qcow2::format::full_extent(size, cluster_bits).next_multiple_of(4096);
    let extent = extent + (dice.below(16) << cluster_bits);
    Shape { size, cluster_bits, extent, backing, geometry, pages: 16 + dice.below(48) as usize }
}

fn random_kills(seed: u64, power: bool) -> Host {
    let mut dice = Dice::new(seed);
    let mut shape = any_shape(&mut dice);
    shape.geometry.volatile_cache |= power;
    let most = u64::from(shape.geometry.max_sectors)
        .min(u64::from(shape.geometry.max_buffers - 1) * 8)
        .min(1 + dice.below(200));
    let mut actions = load(&mut dice, &shape, 60, most);
    if shape.geometry.sector_size == 4096 {
        for action in &mut actions {
            action.sectors = action.sectors.min(u64::from(shape.geometry.max_sectors));
        }
    }
    let mut host = Host::new(shape, seed);
    host.aligned = shape.geometry.sector_size == 4096;
    let depth = 1 + dice.below(16) as usize;
    let (mut life, mut deaths) = (dice.below(100), 0);
    host.image.resume(&mut host.disks);
    while !actions.is_empty() || host.in_flight() > 0 || !host.disks.pending.is_empty() {
        if life > 0 {
            life -= 1;
            if !host.opening_step() {
                host.step(&mut actions, depth);
            }
            continue;
        }
        // A life that is too short for the copy of a cluster would be followed by the same.
        deaths += 1;
        life = dice.below(100 << (deaths / 4).min(8));
        let is_cut = power && dice.one_in(2);
        if is_cut {
            host.power_fails()
        } else {
            host.driver_dies()
        }
        if dice.one_in(4) {
            // It dies while it opens the image, too.
            host.image.resume(&mut host.disks);
            (0..dice.below(12)).for_each(|_| {
                host.opening_step();
            });
            host.driver_dies();
        }
        host.start_well();
        let report = host.disks.image.check();
        assert_eq!(report.errors, 0, "seed {seed}: {report:?}");
        assert!(power || report.leaks == 0, "seed {seed}: {report:?}");
        if is_cut {
            host.settle();
        }
        host.replay();
    }
    // What a power cut lost may be missed later.
    let is_fine = |error: &DiskError| power && *error == DiskError::NoSpace;
    assert!(host.errors.iter().all(is_fine), "seed {seed}: {:?}", host.errors);
    let report = host.disks.image.check();
    assert!(report.errors == 0 && (power || report.leaks == 0), "seed {seed}: {report:?}");
    host
}

fn dose(normal: u64) -> u64 {
    std::env::var("QCOW2_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(normal)
}

#[test]
fn random_kills_lose_nothing() {
    for seed in 0..dose(30) {
        let mut host = random_kills(seed, false);
        let bytes = host.read_all();
        if seed % 10 == 0 {
            qemu::judge(&host.disks, &bytes, "kills");
        }
    }
}

#[test]
fn power_cuts_corrupt_nothing() {
    for seed in 0..dose(30) {
        random_kills(seed, true).read_touched();
    }
}

/// `QCOW2_SEEDS=100000 cargo test -p qcow2 --release -- --ignored`
#[test]
#[ignore = "takes minutes"]
fn many_random_kills_lose_nothing() {
    for seed in 1000..1000 + dose(5000) {
        let mut host = random_kills(seed, false);
        let bytes = host.read_all();
        if seed % 10 == 0 {
            qemu::judge(&host.disks, &bytes, "many-kills");
        }
        random_kills(seed, true).read_touched();
    }
}

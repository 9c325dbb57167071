//! PCI functions: an owner reaches its registers and its interrupts, and can aim neither.

use axolotl_abi::control::{
    self, ASSIGN_DMA_TRUSTED, AssignDevice, GET_PCI_FUNCTION, INFO_DMA_TRUSTED, PciFunction,
};
use axolotl_abi::device::{self, BindInterrupt, Config as ConfigAccess, DeviceInfo, Translate};
use axolotl_abi::start::MMIO_GPA;
use axolotl_abi::{CONTROL_OP, DEVICE_OP};
use hv_core::fake::{Config, D0, DATA, FakeFunction, SCRATCH, System};
use hv_core::platform::{DEVICE_VECTORS, Exit, Platform};
use xen_abi::grant::{GNTMAP_DEVICE_MAP, GNTMAP_HOST_MAP, GrantStatus, MAP_GRANT_REF, MapGrantRef};
use xen_abi::hypercall::GRANT_TABLE_OP;
use xen_abi::{DomainId, Errno, EventPort, Gfn, GrantRef};
use zerocopy::FromZeros;

const NIC: u32 = 1 << 3;
const OTHER: u32 = 2 << 3;
const BAR: u32 = 0x8000_0000;
const TABLE: u64 = BAR as u64 + 0x2_0000;

fn system() -> System {
    System::with(Config {
        functions: vec![FakeFunction::nic(1, BAR), FakeFunction::msi_only(2, BAR + 0x10_0000)],
        ..Config::default()
    })
}

fn assign(system: &mut System, domid: DomainId, bdf: u32, gpa: u64) -> Result<u64, i64> {
    let op = AssignDevice { domid, pad: 0, bdf, flags: ASSIGN_DMA_TRUSTED, pad2: 0, gpa };
    let (result, op) = system.call_with(D0, CONTROL_OP, control::ASSIGN_DEVICE, op);
    if result == 0 { Ok(op.gpa) } else { Err(result) }
}

fn driver(system: &mut System, bdf: u32) -> DomainId {
    let driver = system.guest("driver");
    assert_eq!(system.control_domain(control::RESTART, driver), 0);
    assign(system, driver, bdf, MMIO_GPA).unwrap();
    system.start(driver);
    driver
}

fn bind(system: &mut System, id: DomainId, vector: u32) -> Result<EventPort, i64> {
    let op = BindInterrupt { index: 0, vector, port: EventPort(0) };
    let (result, op) = system.call_with(id, DEVICE_OP, device::BIND_INTERRUPT, op);
    if result == 0 { Ok(op.port) } else { Err(result) }
}

fn config(system: &mut System, id: DomainId, op: u64, at: (u16, u16), value: u32) -> (i64, u32) {
    let access = ConfigAccess { index: 0, offset: at.0, width: at.1, value };
    let (result, access) = system.call_with(id, DEVICE_OP, op, access);
    (result, access.value)
}

fn function<T>(system: &System, bdf: u32, look: impl Fn(&FakeFunction) -> T) -> T {
    look(system.p.machine().functions.iter().find(|f| f.bdf.0 == bdf).unwrap())
}

#[test]
fn enumeration_stops_what_the_firmware_left_running() {
    let mut system = system();
    assert!(!function(&system, NIC, FakeFunction::is_bus_master));
    let mut op = PciFunction::new_zeroed();
    let (result, op0) = system.control(GET_PCI_FUNCTION, op);
    assert_eq!((result, op0.bdf, op0.vendor, op0.device), (0, NIC, 0x8086, 0x10d3));
    assert_eq!((op0.msix_vectors, op0.msi_vectors, op0.owner), (5, 0, DomainId::INVALID));
    op.index = 1;
    let (_, op1) = system.control(GET_PCI_FUNCTION, op);
    assert_eq!((op1.msix_vectors, op1.msi_vectors), (0, 1));
    op.index = 2;
    assert_eq!(system.control(GET_PCI_FUNCTION, op).0, Errno::ENOENT.to_result());
}

#[test]
fn the_page_of_the_msix_table_is_read_only_for_its_owner_and_nothing_is_memory() {
    let mut system = system();
    let driver = driver(&mut system, NIC);
    system.check();
    let mut op = DeviceInfo::new_zeroed();
    op.index = 0;
    let (result, op) = system.call_with(driver, DEVICE_OP, device::GET_DEVICE, op);
    assert_eq!((result, op.bdf, op.msix_vectors, op.dma_translated), (0, NIC, 5, 1));
    assert_eq!((op.bars[0].gpa, op.bars[0].bytes), (MMIO_GPA, 0x2_0000));
    let table = Gfn::containing(op.bars[3].gpa);
    for page in 0..4 {
        let found = system.page(driver, Gfn(table.0 + page)).unwrap();
        assert_eq!(found.write, page != 0, "only the table's page");
        assert!(!found.execute);
    }
    assert!(system.page(driver, Gfn::containing(MMIO_GPA)).unwrap().write);
    // Registers are no buffers for the core.
    let args = [1, MMIO_GPA, 0, 0, 0];
    let result = system.call(driver, xen_abi::hypercall::XEN_VERSION, args);
    assert_eq!(result, Errno::EFAULT.to_result());
    let op = Translate { index: 0, count: 1, gfn: MMIO_GPA >> 12, addresses: SCRATCH + 64 };
    let (result, _) = system.call_with(driver, DEVICE_OP, device::TRANSLATE, op);
    assert_eq!(result, Errno::EFAULT.to_result());
    let op = Translate { gfn: DATA.0, ..op };
    assert_eq!(system.call_with(driver, DEVICE_OP, device::TRANSLATE, op).0, 0);
    let mfn = system.page(driver, DATA).unwrap().mfn;
    assert_eq!(system.get::<u64>(driver, SCRATCH + 64), mfn.address());
    assert_eq!(system.info(driver).flags, INFO_DMA_TRUSTED);
}

#[test]
fn a_granted_page_is_translated_for_the_device_only_if_it_was_mapped_for_it() {
    let mut system = system();
    let driver = driver(&mut system, NIC);
    let guest = system.guest("guest");
    system.grant(guest, GrantRef(8), driver, DATA, false);
    let mut op = MapGrantRef::new_zeroed();
    (op.dom, op.gref) = (guest, GrantRef(8));
    for (gfn, flags, expected) in [
        (0x4_0000, GNTMAP_HOST_MAP, Errno::EFAULT.to_result()),
        (0x4_0001, GNTMAP_HOST_MAP | GNTMAP_DEVICE_MAP, 0),
    ] {
        (op.host_addr, op.flags) = (gfn << 12, flags);
        let (_, map) = system.call_with(driver, GRANT_TABLE_OP, MAP_GRANT_REF, op);
        assert_eq!(map.status, GrantStatus::OKAY);
        let op = Translate { index: 0, count: 1, gfn, addresses: SCRATCH + 64 };
        let (result, _) = system.call_with(driver, DEVICE_OP, device::TRANSLATE, op);
        assert_eq!(result, expected);
    }
    let mfn = system.page(guest, DATA).unwrap().mfn;
    assert_eq!(system.get::<u64>(driver, SCRATCH + 64), mfn.address());
    system.check();
}

#[test]
fn an_owner_changes_three_bits_of_the_command_register_and_nothing_else() {
    let mut system = system();
    let driver = driver(&mut system, NIC);
    let write = device::CONFIG_WRITE;
    assert_eq!(config(&mut system, driver, write, (4, 2), 0xffff).0, 0);
    assert_eq!(function(&system, NIC, |f| f.half(4)), 0x406);
    let before = function(&system, NIC, |f| f.config.clone());
    let (eperm, einval) = (Errno::EPERM.to_result(), Errno::EINVAL.to_result());
    for offset in (0..256).step_by(4) {
        assert_eq!(config(&mut system, driver, write, (offset, 4), !0).0, eperm);
    }
    for (at, expected) in [
        ((0xa2, 2), eperm),
        ((0xe8, 2), eperm),
        ((0x10, 1), eperm),
        ((4, 1), eperm),
        ((5, 2), einval),
        ((4, 3), einval),
        ((4, 8), einval),
        ((4096, 4), einval),
        ((0xffff, 1), einval),
        ((4, 0), einval),
    ] {
        assert_eq!(config(&mut system, driver, write, at, !0).0, expected, "{at:?}");
    }
    assert_eq!(function(&system, NIC, |f| f.config.clone()), before);
    assert_eq!(config(&mut system, driver, device::CONFIG_READ, (0, 4), 0), (0, 0x10d3_8086));
    let stranger = system.guest("stranger");
    let (result, _) = config(&mut system, stranger, device::CONFIG_READ, (0, 4), 0);
    assert_eq!(result, Errno::ENODEV.to_result());
}

#[test]
fn an_interrupt_is_an_event_of_the_owner_until_its_port_is_closed() {
    let mut system = system();
    let driver = driver(&mut system, NIC);
    let port = bind(&mut system, driver, 2).unwrap();
    let entry = |system: &System, word: u64| system.p.mmio_read32(TABLE + 32 + 4 * word);
    let vector = u8::try_from(entry(&system, 2)).unwrap();
    assert!(DEVICE_VECTORS.contains(&vector));
    assert_eq!((entry(&system, 0), entry(&system, 1), entry(&system, 3)), (0xfee0_0000, 0, 0));
    assert_eq!(system.p.mmio_read32(TABLE + 12), 1, "the others are masked");
    assert_eq!(bind(&mut system, driver, 2), Err(Errno::EEXIST.to_result()));
    for bad in [5, 0x1_0000, u32::MAX] {
        assert_eq!(bind(&mut system, driver, bad), Err(Errno::EINVAL.to_result()));
    }
    system.check();
    let fire = |system: &mut System| {
        system.run(0, 8);
        system.act(driver, move |_| Exit::Device { vector });
    };
    fire(&mut system);
    assert!(system.is_pending(driver, port));
    // With decoding off, so that the core's write would be lost.
    config(&mut system, driver, device::CONFIG_WRITE, (4, 2), 4);
    system.close(driver, port);
    assert_eq!(entry(&system, 3), 1, "masked all the same");
    fire(&mut system);
    assert!(!system.is_pending(driver, port));
    let again = bind(&mut system, driver, 2).unwrap();
    assert_eq!(again, port);
    system.check();
}

#[test]
fn at_death_a_device_stops_and_its_routes_are_gone_and_the_next_life_binds_again() {
    for bdf in [NIC, OTHER] {
        let mut system = system();
        let driver = driver(&mut system, bdf);
        let port = bind(&mut system, driver, 0).unwrap();
        config(&mut system, driver, device::CONFIG_WRITE, (4, 2), 6);
        assert!(function(&system, bdf, FakeFunction::can_interrupt));
        system.act(driver, |_| Exit::Fault { vector: 6, error: 0, address: 0 });
        assert!(!function(&system, bdf, FakeFunction::is_bus_master));
        let enabled = |f: &FakeFunction| {
            (f.msix != 0 && f.half(f.msix + 2) & 0xc000 == 0x8000)
                || (f.msi != 0 && f.half(f.msi + 2) & 1 != 0)
        };
        assert!(!function(&system, bdf, enabled), "no messages whatever the owner turns on");
        system.restart(driver);
        assert!(system.page(driver, Gfn::containing(MMIO_GPA)).is_some(), "still there");
        assert_eq!(bind(&mut system, driver, 0), Ok(port));
        assert!(function(&system, bdf, enabled));
        system.check();
    }
}

#[test]
fn a_released_function_is_reset_before_the_next_owner_gets_it() {
    let mut system = system();
    let first = driver(&mut system, NIC);
    bind(&mut system, first, 0).unwrap();
    let second = system.guest("second");
    assert_eq!(system.control_domain(control::RESTART, second), 0);
    let errno = |errno: Errno| Err(errno.to_result());
    assert_eq!(assign(&mut system, second, NIC, MMIO_GPA), errno(Errno::EBUSY));
    system.destroy(first);
    assert_eq!(function(&system, NIC, |f| f.resets), 1);
    assert_eq!(assign(&mut system, second, NIC, MMIO_GPA), errno(Errno::EAGAIN));
    system.advance(100_000_000);
    let end = assign(&mut system, second, NIC, MMIO_GPA).unwrap();
    assert_eq!(end, MMIO_GPA + 0x2_4000);
    let bars = function(&system, NIC, |f| (f.half(0x12), f.half(0x1e)));
    assert_eq!(bars, (0x8000, 0x8002), "where they were");
    system.check();
}

#[test]
fn an_assignment_that_fails_leaves_no_registers_mapped() {
    let mut system = system();
    let guest = system.guest("guest");
    assert_eq!(system.control_domain(control::RESTART, guest), 0);
    // Its memory is in the way of the second BAR.
    let gpa = DATA.address() - 4096 - 0x2_0000;
    assert_eq!(assign(&mut system, guest, NIC, gpa), Err(Errno::EEXIST.to_result()));
    assert_eq!(system.page(guest, Gfn::containing(gpa)), None);
    system.check();
    system.advance(100_000_000);
    assign(&mut system, guest, NIC, MMIO_GPA).unwrap();
    for gpa in [!0 - 0x1_0000, (1 << 47) - 4096] {
        assert!(assign(&mut system, guest, OTHER, gpa).is_err());
        system.advance(100_000_000);
    }
    assign(&mut system, guest, OTHER, MMIO_GPA + 0x10_0000).unwrap();
    system.check();
}

#[test]
fn functions_whose_registers_share_a_page_or_claim_nonsense_are_not_mapped() {
    let mut close = FakeFunction::nic(2, BAR + 0x2_0000 + 0x4000 - 0x100);
    close.bar_bytes = [0x100, 0, 0, 0, 0, 0];
    let mut liar = FakeFunction::nic(3, 0x9000_0000);
    // A table behind its BAR, a capability list that is a circle.
    liar.config[0xa4..0xa8].copy_from_slice(&0x3ffb_u32.to_le_bytes());
    liar.config[0xe1] = 0xa0;
    let functions = vec![FakeFunction::nic(1, BAR), close, liar];
    let mut system = System::with(Config { functions, ..Config::default() });
    let guest = system.guest("guest");
    assert_eq!(system.control_domain(control::RESTART, guest), 0);
    assign(&mut system, guest, OTHER, MMIO_GPA).unwrap();
    assert_eq!(system.page(guest, Gfn::containing(MMIO_GPA)), None);
    assign(&mut system, guest, 3 << 3, MMIO_GPA).unwrap();
    system.start(guest);
    let mut op = DeviceInfo::new_zeroed();
    op.index = 1;
    let (_, op) = system.call_with(guest, DEVICE_OP, device::GET_DEVICE, op);
    assert_eq!((op.msix_vectors, op.msi_vectors), (0, 0));
    let op = BindInterrupt { index: 1, vector: 0, port: EventPort(0) };
    let (result, _) = system.call_with(guest, DEVICE_OP, device::BIND_INTERRUPT, op);
    assert_eq!(result, Errno::EINVAL.to_result());
    system.check();
}

#[test]
fn registers_that_claim_memory_are_mapped_for_nobody() {
    // The fake machine's memory starts at 0; a megabyte of it is claimed.
    let mut system = System::with(Config {
        functions: vec![FakeFunction::nic(1, 0x10_0000)],
        ..Config::default()
    });
    let driver = driver(&mut system, NIC);
    let (result, info) =
        system.call_with(driver, DEVICE_OP, device::GET_DEVICE, DeviceInfo::new_zeroed());
    assert_eq!(result, 0);
    assert!(info.bars.iter().all(|bar| bar.gpa == 0 && bar.bytes == 0));
    assert_eq!(info.msix_vectors, 0, "its table would be in memory");
    assert!(system.page(driver, Gfn::containing(MMIO_GPA)).is_none());
    system.check();
}

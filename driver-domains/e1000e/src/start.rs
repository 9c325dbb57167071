//! From any state to a running device.
//!
//! Source: 82574 datasheet, chapter 4 ("Initialization"): interrupts off, receiver and
//! transmitter off, master disable, device reset, automatic EEPROM read, then general
//! configuration, interrupts, receive and transmit initialization.

use crate::descriptor::{DESCRIPTOR_BYTES, RING};
use crate::receive::Receiver;
use crate::registers as reg;
use crate::transmit::Transmitter;
use crate::{E1000e, PciId, Statistics, VECTOR_OTHER, VECTOR_QUEUES};
use core::fmt;
use domain_api::nic::Offloads;
use domain_api::{Clock, Dma, Errno, Registers};

/// Longest wait for requests under way to end. The device is reset even if they do not.
const MASTER_DISABLE_NS: u64 = 10_000_000;
/// Longest wait for firmware to leave the PHY alone.
const OWNERSHIP_NS: u64 = 10_000_000;
/// Shortest time between the reset and the next access.
const RESET_SETTLE_NS: u64 = 1_000;
/// Longest reset.
const RESET_NS: u64 = 20_000_000;
/// Longest EEPROM access.
const EEPROM_NS: u64 = 20_000_000;
/// Least time between two interrupts of a vector, in 256 ns; see the crate's documentation.
const THROTTLE: u32 = 20_000 / 256;
/// `RDLEN` and `TDLEN`.
#[expect(clippy::cast_possible_truncation, reason = "4096")]
const RING_BYTES: u32 = RING as u32 * DESCRIPTOR_BYTES as u32;

/// Why a device could not be started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StartError {
    /// Not a device of this driver.
    Unsupported(PciId),
    /// All registers read as ones.
    Gone,
    /// The reset did not end.
    ResetStuck,
    /// The automatic EEPROM read after the reset did not end.
    EepromStuck,
    /// Neither EEPROM nor address register holds an Ethernet address of a station.
    NoAddress,
    /// No memory for rings and buffers.
    Memory(Errno),
    /// Bus mastering could not be turned on.
    BusMaster(Errno),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported(id) => write!(
                f,
                "device {:04x}:{:04x} is not supported; this driver is for the Intel 82574L (8086:10d3)",
                id.vendor, id.device
            ),
            Self::Gone => f.write_str("the controller does not answer on the bus"),
            Self::ResetStuck => f.write_str("the controller's reset did not end"),
            Self::EepromStuck => f.write_str("the controller did not finish reading its EEPROM"),
            Self::NoAddress => f.write_str("the controller has no valid Ethernet address"),
            Self::Memory(errno) => write!(f, "no memory for rings and buffers: {errno:?}"),
            Self::BusMaster(errno) => write!(f, "bus mastering cannot be turned on: {errno:?}"),
        }
    }
}

impl core::error::Error for StartError {}

impl<R: Registers> E1000e<R> {
    /// Resets the device `id` behind `registers` and starts it: promiscuous, for a switch needs
    /// every frame; all its interrupts armed.
    ///
    /// Bus mastering should be off: the device may still have the rings of an earlier owner, and
    /// would write into whatever is there now. `master` turns it on; it is called once, when
    /// the device has been reset and before it gets new rings.
    ///
    /// # Errors
    /// See [`StartError`]; the device is then stopped.
    pub fn start(
        id: PciId,
        mut registers: R,
        dma: &mut impl Dma,
        clock: &impl Clock,
        master: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<Self, StartError> {
        if !id.is_82574l() {
            return Err(StartError::Unsupported(id));
        }
        reset(&mut registers, clock)?;
        let mac = station_address(&mut registers, clock)?;
        let mut device = Self {
            registers,
            mac,
            link: false,
            cuts_v6: !id.is_qemu(),
            offers: Offloads::default(),
            receiver: Receiver::new(dma).map_err(StartError::Memory)?,
            transmitter: Transmitter::new(dma).map_err(StartError::Memory)?,
            statistics: Statistics::default(),
        };
        master().map_err(StartError::BusMaster)?;
        device.configure();
        Ok(device)
    }

    fn configure(&mut self) {
        set_link_up(&mut self.registers);
        set_address(&mut self.registers, self.mac);
        route_interrupts(&mut self.registers);
        start_receiver(&mut self.registers, &mut self.receiver);
        start_transmitter(&mut self.registers, &self.transmitter);
        self.refresh_link();
        self.statistics.collect(&self.registers); // Reading clears what others left.
        self.statistics = Statistics::default();
        self.registers.write(reg::IMS, reg::INT_RXQ0 | reg::INT_OTHER | reg::INT_LSC);
    }
}

/// Waits until `done`, at most `limit_ns`.
fn wait(clock: &impl Clock, limit_ns: u64, mut done: impl FnMut() -> bool) -> bool {
    let begin = clock.now_ns();
    loop {
        if done() {
            return true;
        }
        if clock.now_ns().saturating_sub(begin) > limit_ns {
            return done();
        }
        core::hint::spin_loop();
    }
}

/// Ends all activity of the device and resets it, but for its PHY.
fn reset<R: Registers>(r: &mut R, clock: &impl Clock) -> Result<(), StartError> {
    if r.read(reg::STATUS) == u32::MAX {
        return Err(StartError::Gone);
    }
    r.write(reg::IMC, u32::MAX);
    r.write(reg::RCTL, 0);
    r.write(reg::TCTL, reg::TCTL_PSP);
    let control = r.read(reg::CTRL) & !reg::CTRL_PHY_RST;
    r.write(reg::CTRL, control | reg::CTRL_GIO_MASTER_DISABLE);
    // Bus mastering was taken away when the last owner died, so requests under way have ended
    // or never will; a reset is right in both cases.
    wait(clock, MASTER_DISABLE_NS, || r.read(reg::STATUS) & reg::STATUS_GIO_MASTER_ENABLE == 0);
    own_phy(r, clock);
    r.write(reg::CTRL, control | reg::CTRL_GIO_MASTER_DISABLE | reg::CTRL_RST);
    let begin = clock.now_ns();
    while clock.now_ns().saturating_sub(begin) < RESET_SETTLE_NS {
        core::hint::spin_loop();
    }
    if !wait(clock, RESET_NS, || r.read(reg::CTRL) & reg::CTRL_RST == 0) {
        return Err(StartError::ResetStuck);
    }
    if !wait(clock, EEPROM_NS, || r.read(reg::EECD) & reg::EECD_AUTO_RD != 0) {
        return Err(StartError::EepromStuck);
    }
    let external = r.read(reg::EXTCNF_CTRL);
    r.write(reg::EXTCNF_CTRL, external & !reg::EXTCNF_MDIO_SW_OWNERSHIP);
    r.write(reg::IMC, u32::MAX);
    let pending = r.read(reg::ICR);
    r.write(reg::ICR, pending);
    Ok(())
}

/// Keeps firmware from talking to the PHY during the reset. When it does not let go in time the
/// reset takes place nevertheless, as the firmware may be what hangs.
fn own_phy<R: Registers>(r: &mut R, clock: &impl Clock) {
    wait(clock, OWNERSHIP_NS, || {
        let external = r.read(reg::EXTCNF_CTRL);
        r.write(reg::EXTCNF_CTRL, external | reg::EXTCNF_MDIO_SW_OWNERSHIP);
        r.read(reg::EXTCNF_CTRL) & reg::EXTCNF_MDIO_SW_OWNERSHIP != 0
    });
}

/// Reads a word of the EEPROM.
fn eeprom<R: Registers>(r: &mut R, clock: &impl Clock, word: u32) -> Option<u16> {
    r.write(reg::EERD, word << reg::EERD_ADDR_SHIFT | reg::EERD_START);
    let mut value = 0;
    wait(clock, EEPROM_NS, || {
        value = r.read(reg::EERD);
        value & reg::EERD_DONE != 0
    })
    .then_some((value >> reg::EERD_DATA_SHIFT) as u16)
}

/// The device's own address: words 0 to 2 of the EEPROM, or what the device itself loaded into its
/// first address register.
fn station_address<R: Registers>(r: &mut R, clock: &impl Clock) -> Result<[u8; 6], StartError> {
    let mut from_eeprom = || {
        let mut mac = [0; 6];
        for (word, bytes) in (0..).zip(mac.chunks_exact_mut(2)) {
            bytes.copy_from_slice(&eeprom(r, clock, word)?.to_le_bytes());
        }
        is_station(mac).then_some(mac)
    };
    from_eeprom().or_else(|| loaded_address(r)).ok_or(StartError::NoAddress)
}

fn loaded_address(r: &impl Registers) -> Option<[u8; 6]> {
    let (low, high) = (r.read(reg::RAL0).to_le_bytes(), r.read(reg::RAH0));
    let [b4, b5, ..] = high.to_le_bytes();
    let mac = [low[0], low[1], low[2], low[3], b4, b5];
    (high & reg::RAH_AV != 0 && is_station(mac)).then_some(mac)
}

/// Neither a group's address nor nothing.
fn is_station(mac: [u8; 6]) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

/// Lets the MAC follow the PHY's link, whose negotiation goes on or is over: neither PHY
/// register nor `PHY_RST` is touched. Flow control is off: a full switch drops, TCP slows down.
fn set_link_up(r: &mut impl Registers) {
    let clear = reg::CTRL_GIO_MASTER_DISABLE
        | reg::CTRL_ILOS
        | reg::CTRL_FRCSPD
        | reg::CTRL_FRCDPLX
        | reg::CTRL_RST
        | reg::CTRL_RFCE
        | reg::CTRL_TFCE
        | reg::CTRL_VME
        | reg::CTRL_PHY_RST;
    let control = r.read(reg::CTRL) & !clear;
    r.write(reg::CTRL, control | reg::CTRL_SLU | reg::CTRL_ASDE);
    for offset in reg::FLOW_CONTROL {
        r.write(offset, 0);
    }
}

fn set_address(r: &mut impl Registers, mac: [u8; 6]) {
    r.write(reg::RAL0, u32::from_le_bytes([mac[0], mac[1], mac[2], mac[3]]));
    r.write(reg::RAH0, u32::from_le_bytes([mac[4], mac[5], 0, 0]) | reg::RAH_AV);
}

/// Sets up MSI-X; everything is still masked.
fn route_interrupts(r: &mut impl Registers) {
    let to = |vector: u32, shift: u32| (vector | reg::IVAR_VALID) << shift;
    let queues = reg::INT_RXQ0 | reg::INT_TXQ0;
    r.write(
        reg::IVAR,
        to(VECTOR_QUEUES, reg::IVAR_RXQ0_SHIFT)
            | to(VECTOR_QUEUES, reg::IVAR_TXQ0_SHIFT)
            | to(VECTOR_OTHER, reg::IVAR_OTHER_SHIFT),
    );
    r.write(reg::EIAC, queues);
    r.write(reg::IAM, queues);
    let extended = r.read(reg::CTRL_EXT) & !reg::CTRL_EXT_IAME;
    r.write(reg::CTRL_EXT, extended | reg::CTRL_EXT_EIAME | reg::CTRL_EXT_DRV_LOAD);
    for vector in 0..reg::VECTORS {
        r.write(reg::EITR + 4 * vector, THROTTLE);
    }
}

/// The low and high half of a bus address.
#[expect(clippy::cast_possible_truncation, reason = "the halves are what is wanted")]
fn halves(address: u64) -> (u32, u32) {
    (address as u32, (address >> 32) as u32)
}

fn start_receiver<R: Registers>(r: &mut R, receiver: &mut Receiver) {
    let (low, high) = halves(receiver.ring_address());
    r.write(reg::RDBAL, low);
    r.write(reg::RDBAH, high);
    r.write(reg::RDLEN, RING_BYTES);
    r.write(reg::RDH, 0);
    r.write(reg::RDT, 0);
    r.write(reg::RDTR, 0);
    r.write(reg::RADV, 0);
    r.write(reg::RSRPD, 0);
    r.write(reg::RXDCTL, reg::DCTL_GRAN | reg::DCTL_WTHRESH_1);
    r.write(reg::RXCSUM, reg::RXCSUM_IPOFLD | reg::RXCSUM_TUOFLD);
    // Legacy descriptors, and no interrupt for each TCP acknowledgement.
    r.write(reg::RFCTL, reg::RFCTL_ACK_DIS | reg::RFCTL_NO_PARSING);
    // The multicast table needs no clearing: promiscuous reception does not look at it.
    let promiscuous = reg::RCTL_UPE | reg::RCTL_MPE | reg::RCTL_BAM;
    r.write(reg::RCTL, reg::RCTL_EN | promiscuous | reg::RCTL_SECRC);
    receiver.publish_all(r);
}

fn start_transmitter(r: &mut impl Registers, transmitter: &Transmitter) {
    let (low, high) = halves(transmitter.ring_address());
    r.write(reg::TDBAL, low);
    r.write(reg::TDBAH, high);
    r.write(reg::TDLEN, RING_BYTES);
    r.write(reg::TDH, 0);
    r.write(reg::TDT, 0);
    r.write(reg::TIDV, 0);
    r.write(reg::TADV, 0);
    r.write(reg::TXDCTL, reg::DCTL_GRAN | reg::DCTL_WTHRESH_1);
    let arbitration = r.read(reg::TARC0);
    r.write(reg::TARC0, arbitration | reg::TARC_ENABLE);
    r.write(reg::TIPG, reg::TIPG_RECOMMENDED);
    let control = reg::TCTL_PSP | reg::TCTL_CT | reg::TCTL_COLD | reg::TCTL_MULR;
    r.write(reg::TCTL, control | reg::TCTL_EN);
}

//! Registers of the host bus adapter and of its ports: names, offsets, bits.
//!
//! Source: Serial ATA Advanced Host Controller Interface (AHCI) 1.3.1, §3.

/// Capabilities.
pub const CAP: u32 = 0x00;
/// `CAP`: number of command slots, minus one.
pub const CAP_NCS_SHIFT: u32 = 8;
/// `CAP`: native command queueing.
pub const CAP_SNCQ: u32 = 1 << 30;
/// `CAP`: addresses of 64 bits.
pub const CAP_S64A: u32 = 1 << 31;

/// Global control.
pub const GHC: u32 = 0x04;
/// `GHC`: reset.
pub const GHC_HR: u32 = 1 << 0;
/// `GHC`: interrupts.
pub const GHC_IE: u32 = 1 << 1;
/// `GHC`: AHCI mode.
pub const GHC_AE: u32 = 1 << 31;

/// Interrupt status: a bit for each port; cleared by writing ones, after the port's own.
pub const IS: u32 = 0x08;
/// Ports implemented: a bit for each.
pub const PI: u32 = 0x0c;
/// Version.
pub const VS: u32 = 0x10;

/// More capabilities.
pub const CAP2: u32 = 0x24;
/// `CAP2`: the firmware hands over by [`BOHC`].
pub const CAP2_BOH: u32 = 1 << 0;
/// Hand-over from the firmware.
pub const BOHC: u32 = 0x28;
/// `BOHC`: the firmware owns the controller.
pub const BOHC_BOS: u32 = 1 << 0;
/// `BOHC`: we want to own it.
pub const BOHC_OOS: u32 = 1 << 1;
/// `BOHC`: the firmware is busy with outstanding commands.
pub const BOHC_BB: u32 = 1 << 4;

/// Where the ports' registers begin.
pub const PORTS: u32 = 0x100;
/// Bytes of a port's registers.
pub const PORT_BYTES: u32 = 0x80;
/// Most ports.
pub const MAX_PORTS: u32 = 32;

/// Port: address of the command list, aligned to 1 KiB.
pub const CLB: u32 = 0x00;
/// Port: its upper half.
pub const CLBU: u32 = 0x04;
/// Port: address for received FISes, aligned to 256 bytes.
pub const FB: u32 = 0x08;
/// Port: its upper half.
pub const FBU: u32 = 0x0c;

/// Port: interrupt status; cleared by writing ones.
pub const PXIS: u32 = 0x10;
/// Port: interrupt enable; bits as in [`PXIS`].
pub const PXIE: u32 = 0x14;
/// A register FIS from the device: an unqueued command ended.
pub const INT_DHR: u32 = 1 << 0;
/// A PIO set-up FIS.
pub const INT_PS: u32 = 1 << 1;
/// A set-device-bits FIS: queued commands ended.
pub const INT_SDB: u32 = 1 << 3;
/// An unknown FIS.
pub const INT_UF: u32 = 1 << 4;
/// The device was exchanged.
pub const INT_PC: u32 = 1 << 6;
/// The link went away or came.
pub const INT_PRC: u32 = 1 << 22;
/// More data than the command had room for.
pub const INT_OF: u32 = 1 << 24;
/// A fatal error of the link.
pub const INT_IF: u32 = 1 << 27;
/// The controller could not use memory for data.
pub const INT_HBD: u32 = 1 << 28;
/// The controller could not use memory for its own structures.
pub const INT_HBF: u32 = 1 << 29;
/// The device reported an error.
pub const INT_TFE: u32 = 1 << 30;

/// Port: command and status.
pub const CMD: u32 = 0x18;
/// `CMD`: processes the command list.
pub const CMD_ST: u32 = 1 << 0;
/// `CMD`: spins the device up.
pub const CMD_SUD: u32 = 1 << 1;
/// `CMD`: powers the device.
pub const CMD_POD: u32 = 1 << 2;
/// `CMD`: receives FISes.
pub const CMD_FRE: u32 = 1 << 4;
/// `CMD`: which slot it works on, or failed at.
pub const CMD_CCS_SHIFT: u32 = 8;
/// `CMD`: FISes are being received.
pub const CMD_FR: u32 = 1 << 14;
/// `CMD`: the command list is being processed.
pub const CMD_CR: u32 = 1 << 15;
/// `CMD`: the link's power state; to be made active.
pub const CMD_ICC_MASK: u32 = 0xf << 28;
/// `CMD`: the link is to be active.
pub const CMD_ICC_ACTIVE: u32 = 1 << 28;

/// Port: task file: the device's status (bits 0..8) and error (bits 8..16).
pub const TFD: u32 = 0x20;
/// Port: the device's signature.
pub const SIG: u32 = 0x24;
/// `SIG` of an ATA disk.
pub const SIG_ATA: u32 = 0x0000_0101;

/// Port: state of the link.
pub const SSTS: u32 = 0x28;
/// `SSTS` and `SCTL`: detection.
pub const DET_MASK: u32 = 0xf;
/// `SSTS`: nothing there.
pub const DET_NONE: u32 = 0;
/// `SSTS`: a device, and the link works.
pub const DET_UP: u32 = 3;
/// Port: control of the link.
pub const SCTL: u32 = 0x2c;
/// `SCTL`: resets the link, which resets the device.
pub const SCTL_DET_RESET: u32 = 1;
/// `SCTL`: no power saving.
pub const SCTL_IPM_OFF: u32 = 3 << 8;
/// Port: errors of the link; cleared by writing ones.
pub const SERR: u32 = 0x30;
/// Port: queued commands that are not complete; a one is written before the slot is issued.
pub const SACT: u32 = 0x34;
/// Port: commands issued.
pub const CI: u32 = 0x38;

/// Device status: an error.
pub const STATUS_ERR: u8 = 1 << 0;
/// Device status: wants to transfer data.
pub const STATUS_DRQ: u8 = 1 << 3;
/// Device status: device fault.
pub const STATUS_DF: u8 = 1 << 5;
/// Device status: ready.
pub const STATUS_DRDY: u8 = 1 << 6;
/// Device status: busy.
pub const STATUS_BSY: u8 = 1 << 7;

/// Device error: the command was aborted.
pub const ERROR_ABRT: u8 = 1 << 2;
/// Device error: no such address.
pub const ERROR_IDNF: u8 = 1 << 4;
/// Device error: uncorrectable data.
pub const ERROR_UNC: u8 = 1 << 6;
/// Device error: the data was damaged on the link.
pub const ERROR_ICRC: u8 = 1 << 7;

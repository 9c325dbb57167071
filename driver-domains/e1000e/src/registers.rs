//! Registers of the 82574L: offsets in BAR 0, and the bits that this driver uses.
//!
//! Source: Intel 82574 GbE Controller Family Datasheet, revision 3.4, chapter 10 ("Driver
//! Programming Interface").

/// Device control.
pub const CTRL: u32 = 0x0000;
/// `CTRL`: no new requests as PCIe master.
pub const CTRL_GIO_MASTER_DISABLE: u32 = 1 << 2;
/// `CTRL`: auto-speed detection.
pub const CTRL_ASDE: u32 = 1 << 5;
/// `CTRL`: set link up: lets the MAC see the PHY's link.
pub const CTRL_SLU: u32 = 1 << 6;
/// `CTRL`: invert loss of signal; reserved for this PHY, must be 0.
pub const CTRL_ILOS: u32 = 1 << 7;
/// `CTRL`: speed is forced.
pub const CTRL_FRCSPD: u32 = 1 << 11;
/// `CTRL`: duplex is forced.
pub const CTRL_FRCDPLX: u32 = 1 << 12;
/// `CTRL`: device reset, clears itself.
pub const CTRL_RST: u32 = 1 << 26;
/// `CTRL`: obey received pause frames.
pub const CTRL_RFCE: u32 = 1 << 27;
/// `CTRL`: send pause frames.
pub const CTRL_TFCE: u32 = 1 << 28;
/// `CTRL`: strip and insert VLAN tags.
pub const CTRL_VME: u32 = 1 << 30;
/// `CTRL`: reset the PHY, which drops the link and negotiates anew.
pub const CTRL_PHY_RST: u32 = 1 << 31;

/// Device status.
pub const STATUS: u32 = 0x0008;
/// `STATUS`: link up.
pub const STATUS_LU: u32 = 1 << 1;
/// `STATUS`: the link's speed is 1 Gb/s, else 10 or 100 Mb/s.
pub const STATUS_SPEED_1000: u32 = 1 << 7;
/// `STATUS`: master requests are possible or still under way.
pub const STATUS_GIO_MASTER_ENABLE: u32 = 1 << 19;

/// EEPROM control.
pub const EECD: u32 = 0x0010;
/// `EECD`: the automatic read after a reset has finished.
pub const EECD_AUTO_RD: u32 = 1 << 9;

/// EEPROM read.
pub const EERD: u32 = 0x0014;
/// `EERD`: begin.
pub const EERD_START: u32 = 1 << 0;
/// `EERD`: data are valid.
pub const EERD_DONE: u32 = 1 << 1;
/// `EERD`: position of the word address.
pub const EERD_ADDR_SHIFT: u32 = 2;
/// `EERD`: position of the data.
pub const EERD_DATA_SHIFT: u32 = 16;

/// Extended device control.
pub const CTRL_EXT: u32 = 0x0018;
/// `CTRL_EXT`: the causes in `IAM` are masked when their MSI-X message is sent.
pub const CTRL_EXT_EIAME: u32 = 1 << 24;
/// `CTRL_EXT`: reading `ICR` masks what `IAM` names.
pub const CTRL_EXT_IAME: u32 = 1 << 27;
/// `CTRL_EXT`: tells the firmware that a driver runs the device.
pub const CTRL_EXT_DRV_LOAD: u32 = 1 << 28;

/// MDI control, the way to the PHY.
pub const MDIC: u32 = 0x0020;

/// Flow control address, low and high, type and timer.
pub const FLOW_CONTROL: [u32; 4] = [0x0028, 0x002c, 0x0030, 0x0170];

/// Interrupt cause read; writing 1 clears.
pub const ICR: u32 = 0x00c0;
/// Interrupt cause set.
pub const ICS: u32 = 0x00c8;
/// Interrupt mask set.
pub const IMS: u32 = 0x00d0;
/// Interrupt mask clear.
pub const IMC: u32 = 0x00d8;
/// Extended interrupt auto clear.
pub const EIAC: u32 = 0x00dc;
/// Interrupt acknowledge auto mask.
pub const IAM: u32 = 0x00e0;
/// Interrupt vector allocation.
pub const IVAR: u32 = 0x00e4;
/// Extended interrupt throttle, one per vector, in 256 ns.
pub const EITR: u32 = 0x00e8;
/// Number of MSI-X vectors.
pub const VECTORS: u32 = 5;

/// Cause: link status changed.
pub const INT_LSC: u32 = 1 << 2;
/// Cause: receiver overrun.
pub const INT_RXO: u32 = 1 << 6;
/// Cause: MDIO access complete.
pub const INT_MDAC: u32 = 1 << 9;
/// Cause: small receive packet detected.
pub const INT_SRPD: u32 = 1 << 16;
/// Cause: TCP acknowledgement received.
pub const INT_ACK: u32 = 1 << 17;
/// Cause: manageability event.
pub const INT_MNG: u32 = 1 << 18;
/// Cause: descriptors of receive queue 0 written back.
pub const INT_RXQ0: u32 = 1 << 20;
/// Cause: descriptors of transmit queue 0 written back.
pub const INT_TXQ0: u32 = 1 << 22;
/// Cause: any cause that has no queue.
pub const INT_OTHER: u32 = 1 << 24;
/// What [`INT_OTHER`] stands for.
pub const OTHER_CAUSES: u32 = INT_LSC | INT_RXO | INT_MDAC | INT_SRPD | INT_ACK | INT_MNG;

/// `IVAR`: the field is in use.
pub const IVAR_VALID: u32 = 1 << 3;
/// `IVAR`: field of receive queue 0.
pub const IVAR_RXQ0_SHIFT: u32 = 0;
/// `IVAR`: field of transmit queue 0.
pub const IVAR_TXQ0_SHIFT: u32 = 8;
/// `IVAR`: field of the other causes.
pub const IVAR_OTHER_SHIFT: u32 = 16;

/// Receive control.
pub const RCTL: u32 = 0x0100;
/// `RCTL`: enable.
pub const RCTL_EN: u32 = 1 << 1;
/// `RCTL`: all unicast frames.
pub const RCTL_UPE: u32 = 1 << 3;
/// `RCTL`: all multicast frames.
pub const RCTL_MPE: u32 = 1 << 4;
/// `RCTL`: broadcast frames.
pub const RCTL_BAM: u32 = 1 << 15;
/// `RCTL`: strip the frame check sequence. Buffers are of 2048 bytes when all size bits are 0.
pub const RCTL_SECRC: u32 = 1 << 26;

/// Transmit control.
pub const TCTL: u32 = 0x0400;
/// `TCTL`: enable.
pub const TCTL_EN: u32 = 1 << 1;
/// `TCTL`: pad short frames.
pub const TCTL_PSP: u32 = 1 << 3;
/// `TCTL`: collision threshold, the recommended 15.
pub const TCTL_CT: u32 = 0x0f << 4;
/// `TCTL`: collision distance for full duplex.
pub const TCTL_COLD: u32 = 0x3f << 12;
/// `TCTL`: several outstanding descriptor reads.
pub const TCTL_MULR: u32 = 1 << 28;

/// Transmit inter-packet gap.
pub const TIPG: u32 = 0x0410;
/// `TIPG`: IPGT 8, IPGR1 8, IPGR2 6, the recommended values.
pub const TIPG_RECOMMENDED: u32 = 8 | 8 << 10 | 6 << 20;

/// Extended configuration control.
pub const EXTCNF_CTRL: u32 = 0x0f00;
/// `EXTCNF_CTRL`: software owns the way to the PHY; the firmware stays off.
pub const EXTCNF_MDIO_SW_OWNERSHIP: u32 = 1 << 5;

/// Receive descriptor base, low.
pub const RDBAL: u32 = 0x2800;
/// Receive descriptor base, high.
pub const RDBAH: u32 = 0x2804;
/// Receive descriptors, bytes.
pub const RDLEN: u32 = 0x2808;
/// Receive descriptor head.
pub const RDH: u32 = 0x2810;
/// Receive descriptor tail: behind the last one that the device may use.
pub const RDT: u32 = 0x2818;
/// Receive interrupt delay.
pub const RDTR: u32 = 0x2820;
/// Receive descriptor control.
pub const RXDCTL: u32 = 0x2828;
/// Receive absolute delay.
pub const RADV: u32 = 0x282c;
/// Small packet detection; 0: off.
pub const RSRPD: u32 = 0x2c00;

/// Transmit descriptor base, low.
pub const TDBAL: u32 = 0x3800;
/// Transmit descriptor base, high.
pub const TDBAH: u32 = 0x3804;
/// Transmit descriptors, bytes.
pub const TDLEN: u32 = 0x3808;
/// Transmit descriptor head.
pub const TDH: u32 = 0x3810;
/// Transmit descriptor tail.
pub const TDT: u32 = 0x3818;
/// Transmit interrupt delay.
pub const TIDV: u32 = 0x3820;
/// Transmit descriptor control.
pub const TXDCTL: u32 = 0x3828;
/// Transmit absolute delay.
pub const TADV: u32 = 0x382c;
/// Transmit arbitration, queue 0.
pub const TARC0: u32 = 0x3840;
/// `TARC0`: the queue takes part.
pub const TARC_ENABLE: u32 = 1 << 10;

/// `RXDCTL` and `TXDCTL`: thresholds count descriptors, not cache lines.
pub const DCTL_GRAN: u32 = 1 << 24;
/// `RXDCTL` and `TXDCTL`: write back each descriptor at once.
pub const DCTL_WTHRESH_1: u32 = 1 << 16;

/// Receive checksum control.
pub const RXCSUM: u32 = 0x5000;
/// `RXCSUM`: look at checksums of IPv4 headers.
pub const RXCSUM_IPOFLD: u32 = 1 << 8;
/// `RXCSUM`: look at checksums of TCP and UDP.
pub const RXCSUM_TUOFLD: u32 = 1 << 9;
/// Receive filter control.
pub const RFCTL: u32 = 0x5008;
/// `RFCTL`: no interrupt for TCP acknowledgements.
pub const RFCTL_ACK_DIS: u32 = 1 << 12;
/// `RFCTL`: no parsing of iSCSI, NFS writes and NFS reads.
pub const RFCTL_NO_PARSING: u32 = 1 << 0 | 1 << 6 | 1 << 7;
/// Receive address 0, low.
pub const RAL0: u32 = 0x5400;
/// Receive address 0, high.
pub const RAH0: u32 = 0x5404;
/// `RAH0`: the address counts.
pub const RAH_AV: u32 = 1 << 31;

/// CRC errors; this and the following count and are cleared by reading.
pub const CRCERRS: u32 = 0x4000;
/// Receive errors.
pub const RXERRC: u32 = 0x400c;
/// Missed packets: no room in the device's buffer.
pub const MPC: u32 = 0x4010;
/// Good packets received.
pub const GPRC: u32 = 0x4074;
/// Good packets sent.
pub const GPTC: u32 = 0x4080;
/// Good octets received, low; reading the high half clears both.
pub const GORCL: u32 = 0x4088;
/// Good octets received, high.
pub const GORCH: u32 = 0x408c;
/// Good octets sent, low; reading the high half clears both.
pub const GOTCL: u32 = 0x4090;
/// Good octets sent, high.
pub const GOTCH: u32 = 0x4094;
/// Received while no descriptor was free.
pub const RNBC: u32 = 0x40a0;
/// Oversized frames.
pub const ROC: u32 = 0x40ac;

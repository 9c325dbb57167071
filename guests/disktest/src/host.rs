//! `disktest verify IMAGE [AREA]`: verifies a raw image whose log is at sector AREA.

use disktest::image::{self, Report};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

const USAGE: &str = "usage: disktest verify IMAGE [AREA]\n\
    verifies what the last run left in a raw image; AREA is the first sector of its area (0)";

pub fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let area = match words.as_slice() {
        ["verify", _] => Some(0),
        ["verify", _, area] => area.parse().ok(),
        _ => None,
    };
    let Some(area) = area else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match verify(words[1], area) {
        Ok(report) => show(&report),
        Err(error) => {
            eprintln!("{}: {error}", words[1]);
            ExitCode::from(2)
        }
    }
}

fn verify(path: &str, area: u64) -> Result<Report, Box<dyn std::error::Error>> {
    let file = File::open(path)?;
    let read = |sector: u64, bytes: &mut [u8]| file.read_exact_at(bytes, sector * 512);
    image::verify(area, read).map_err(|error| error.to_string().into())
}

fn show(report: &Report) -> ExitCode {
    for mismatch in &report.mismatches {
        println!("VIOLATION {mismatch}");
    }
    let record = report.record;
    let state = if record.ended == 1 { "ended" } else { "stopped" };
    println!(
        "run {:#x} {state} after {} durable requests: {} sectors verified, {} wrong",
        record.run,
        record.flushed,
        report.verified,
        report.mismatches.len()
    );
    if report.mismatches.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

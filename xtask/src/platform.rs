//! Questions to a running platform, asked over the socket that `axl` uses.

use axl::mux::Mux;
use axolotl_abi::protocol::{DomainLine, Info, Request, Response, Why};
use miette::miette;

/// Asks, and wants an answer of one kind.
macro_rules! ask {
    ($mux:expr, $request:expr, $kind:ident) => {
        match $mux.request($request) {
            Ok(Response::$kind(answer)) => Ok(answer),
            Ok(other) => Err(miette!("the control domain answered {other:?}")),
            Err(error) => Err(miette!("the control domain does not answer: {error}")),
        }
    };
}

/// All domains.
///
/// # Errors
/// The control domain does not answer.
pub fn list(mux: &Mux) -> miette::Result<Vec<DomainLine>> {
    ask!(mux, Request::List, List)
}

/// The machine.
///
/// # Errors
/// The control domain does not answer.
pub fn info(mux: &Mux) -> miette::Result<Info> {
    ask!(mux, Request::Info, Info)
}

/// Why a domain's last incarnation ended.
///
/// # Errors
/// The control domain does not answer, or knows no such domain.
pub fn why(mux: &Mux, name: &str) -> miette::Result<Why> {
    ask!(mux, Request::Why(name.into()), Why)
}

/// How a test ends a domain's incarnation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// By a fault, as `axl crash`.
    Crash,
    /// As `axl restart`.
    Restart,
}

/// Makes a domain fault.
///
/// # Errors
/// The control domain does not answer, or refuses.
pub fn crash(mux: &Mux, name: &str) -> miette::Result<()> {
    end(mux, name, End::Crash)
}

/// Ends a domain's incarnation; the next one begins by itself.
///
/// # Errors
/// The control domain does not answer, or refuses.
pub fn end(mux: &Mux, name: &str, how: End) -> miette::Result<()> {
    let request = match how {
        End::Crash => Request::Crash(name.into()),
        End::Restart => Request::Restart(name.into()),
    };
    match mux.request(request) {
        Ok(Response::Done) => Ok(()),
        Ok(other) => Err(miette!("{how:?} of {name} was answered by {other:?}")),
        Err(error) => Err(miette!("the control domain does not answer: {error}")),
    }
}

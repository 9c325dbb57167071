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

/// Makes a domain fault.
///
/// # Errors
/// The control domain does not answer, or refuses.
pub fn crash(mux: &Mux, name: &str) -> miette::Result<()> {
    match mux.request(Request::Crash(name.into())) {
        Ok(Response::Done) => Ok(()),
        Ok(other) => Err(miette!("`crash {name}` was answered by {other:?}")),
        Err(error) => Err(miette!("the control domain does not answer: {error}")),
    }
}

//! What a user sees of a file that breaks a rule.

use miette::{Diagnostic, NamedSource, SourceSpan};
use std::ops::Range;
use thiserror::Error;

/// The text that spans point into.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
}

impl Source {
    pub(crate) fn new(path: &str, text: &str) -> Self {
        Self { path: path.into(), text: text.into() }
    }
}

/// A rule that a system file breaks. Print it with `miette::Report`.
#[derive(Debug, Error, Diagnostic)]
#[error("{message}")]
pub struct SystemError {
    message: String,
    #[source_code]
    source_code: NamedSource<String>,
    #[label("{label}")]
    span: Option<SourceSpan>,
    label: String,
    #[help]
    hint: Option<String>,
}

impl SystemError {
    pub(crate) fn new(
        source: &Source,
        span: Range<usize>,
        message: String,
        hint: String,
    ) -> Box<Self> {
        Box::new(Self {
            message,
            source_code: NamedSource::new(&source.path, source.text.clone()),
            span: Some((span.start, span.len()).into()),
            label: "here".into(),
            hint: (!hint.is_empty()).then_some(hint),
        })
    }

    pub(crate) fn unreadable(path: &str, error: &std::io::Error) -> Box<Self> {
        Box::new(Self {
            message: format!("cannot read {path}: {error}"),
            source_code: NamedSource::new(path, String::new()),
            span: None,
            label: String::new(),
            hint: Some("give the path of a system file, such as systems/default.toml".into()),
        })
    }

    /// What is wrong, in one line.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &str {
        self.source_code.name()
    }

    /// Line of the culprit, from 1; `None` when the file could not be read.
    #[must_use]
    pub fn line(&self) -> Option<usize> {
        let at = self.span?.offset();
        let before = self.source_code.inner().as_bytes().iter().take(at);
        Some(1 + before.filter(|&&byte| byte == b'\n').count())
    }

    /// File, line, message and hint in one line, for places where no report can be drawn.
    #[must_use]
    pub fn one_line(&self) -> String {
        let place = self.line().map_or(String::new(), |line| format!("{}:{line}: ", self.path()));
        let hint = self.hint.as_ref().map_or(String::new(), |hint| format!(" ({hint})"));
        format!("{place}{}{hint}", self.message)
    }
}

//! Counts the lines of the core: neither blank, nor comment, nor test.

use miette::IntoDiagnostic;
use std::path::Path;

/// Lines of code in all Rust files under `directory`, those of tests left out, and the machine that
/// `hv-core` is tested on (`fake.rs`, `invariants.rs`).
///
/// # Errors
/// A file cannot be read.
pub fn count_directory(directory: &Path) -> miette::Result<usize> {
    let mut total = 0;
    for entry in std::fs::read_dir(directory).into_diagnostic()? {
        let path = entry.into_diagnostic()?.path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "tests") {
                total += count_directory(&path)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && path.file_stem().is_none_or(|stem| {
                !["tests", "proptests", "fake", "invariants"].iter().any(|test| stem == *test)
            })
        {
            total += count(&std::fs::read_to_string(&path).into_diagnostic()?);
        }
    }
    Ok(total)
}

/// Lines of code in a Rust source text.
#[must_use]
pub fn count(source: &str) -> usize {
    let code = blank_comments(source);
    let mut lines = code.lines();
    let mut total = 0;
    while let Some(line) = lines.next() {
        let line = line.trim();
        if line.starts_with("#[cfg(") && line.contains("test") && !line.contains("not(test") {
            skip_item(line, &mut lines);
        } else if !line.is_empty() {
            total += 1;
        }
    }
    total
}

/// Passes over the item behind an attribute: to its closing brace, or to a semicolon.
fn skip_item<'a>(attribute: &'a str, lines: &mut impl Iterator<Item = &'a str>) {
    let behind = attribute.split_once(']').map_or("", |(_, behind)| behind);
    let mut depth = 0_i32;
    for line in std::iter::once(behind).chain(lines) {
        for c in line.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if (c == '}' || c == ';') && depth == 0 {
                return;
            }
        }
    }
}

/// The text without comments. What stands in string literals is replaced, so that braces in it
/// do not count.
fn blank_comments(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let taken = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            let len = block_comment(rest);
            newlines(&rest[..len], &mut out);
            len
        } else if let Some(len) = string_literal(rest, out.chars().next_back()) {
            out.push('"');
            for line in rest[..len].split_inclusive('\n') {
                out.push_str(if line.ends_with('\n') { "_\n" } else { "_" });
            }
            len
        } else {
            out.push(first);
            first.len_utf8()
        };
        rest = &rest[taken..];
    }
    out
}

fn newlines(text: &str, out: &mut String) {
    out.extend(text.chars().filter(|c| *c == '\n'));
}

fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0_u32, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if text[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// Length of the string or character literal that `text` starts with.
fn string_literal(text: &str, before: Option<char>) -> Option<usize> {
    let inside_word = before.is_some_and(|c| c.is_alphanumeric() || c == '_');
    if text.starts_with('"') {
        return Some(quoted(text, '"'));
    }
    let hashes = text.strip_prefix('r').filter(|_| !inside_word || before == Some('b'))?;
    let count = hashes.len() - hashes.trim_start_matches('#').len();
    if !hashes[count..].starts_with('"') {
        return None;
    }
    let end = format!("\"{}", "#".repeat(count));
    let body = 2 + count;
    Some(text[body..].find(&end).map_or(text.len(), |at| body + at + end.len()))
}

fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_blank_lines_do_not_count() {
        let source =
            "//! Doc.\n\nfn a() {} // one\n/* two\n lines */ fn b() {\n}\n/* a /* nested */ */\n";
        assert_eq!(count(source), 3);
    }

    #[test]
    fn tests_do_not_count() {
        let source = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() { \"}\" ; }\n}\nfn c() {}\n#[cfg(test)]\nmod more;\nfn d() {}\n";
        assert_eq!(count(source), 3);
        assert_eq!(count("#[cfg(all(test, unix))] mod x;\nfn a() {}"), 1);
        assert_eq!(count("#[cfg(not(test))]\nfn a() {}"), 2);
    }

    #[test]
    fn text_in_strings_is_code() {
        assert_eq!(count("const A: &str = \"// no comment\";\n"), 1);
        assert_eq!(count("asm!(r#\"\n    nop // \"not the end\n    ret\n\"#);\n"), 4);
        assert_eq!(count("let a = 'x'; // c\nlet b = \"\\\"// \";\n"), 2);
    }
}

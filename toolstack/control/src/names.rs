//! Names that were probably meant.

use alloc::vec::Vec;

/// The one of `known` that `word` was probably meant to be: the nearest one, if at most a third
/// of its letters are wrong (and at least one may be).
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let near = known.into_iter().map(|name| (distance(word, name), name)).min()?;
    (near.0 <= (near.1.len() / 3).max(1)).then_some(near.1)
}

/// Letters to insert, remove or replace to get from one word to the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, letter) in from.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, other) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(letter != *other);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_the_textbook() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", ""), 3);
        assert_eq!(distance("net0", "net0"), 0);
    }

    #[test]
    fn only_a_near_name_is_suggested() {
        let known = ["store", "net0", "demo"];
        assert_eq!(nearest("net1", known), Some("net0"));
        assert_eq!(nearest("dmo", known), Some("demo"));
        assert_eq!(nearest("disk0", known), None);
        assert_eq!(nearest("x", []), None);
    }
}

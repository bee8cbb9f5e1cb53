//! How large the terminals of a Lark grammar are once each has those that it names written out.

use std::collections::HashMap;

/// Most names in a terminal that is written out: two of a terminal that holds two of another, and so
/// on, are soon more than any memory holds.
const MOST: usize = 20_000;

/// An error if a terminal of `lark` is too large. What is no grammar is not told here.
pub(super) fn check(lark: &str) -> Result<(), String> {
    let plain = without_literals(lark);
    let mut parts: HashMap<&str, Vec<&str>> = HashMap::new();
    let mut current = None;
    for line in plain.lines() {
        let (defined, body) = match line.split_once(':') {
            Some((head, body)) if !head.starts_with(char::is_whitespace) => {
                (names(head).next(), body)
            }
            _ => (None, line),
        };
        current = defined.or(current);
        if let Some(name) = current {
            let terminals = names(body).filter(|name| is_terminal(name));
            parts.entry(name).or_default().extend(terminals);
        }
    }
    let mut sizes = HashMap::new();
    for name in parts.keys().filter(|name| is_terminal(name)) {
        if size(name, &parts, &mut sizes) > MOST {
            return Err(format!(
                "the terminal {name} is more than {MOST} names long when it is written out; make \
                 it a rule (in lower case)"
            ));
        }
    }
    Ok(())
}

fn is_terminal(name: &str) -> bool {
    name.trim_start_matches('_')
        .starts_with(|c: char| c.is_ascii_uppercase())
}

fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|name| !name.is_empty())
}

/// Names in a terminal, its own included. Recursive: to be called on a deep stack.
fn size<'a>(
    name: &'a str,
    parts: &HashMap<&'a str, Vec<&'a str>>,
    sizes: &mut HashMap<&'a str, usize>,
) -> usize {
    if let Some(known) = sizes.get(name) {
        return *known;
    }
    // One that names itself is an error, which llguidance tells.
    sizes.insert(name, 1);
    let within = parts.get(name).map_or(&[][..], Vec::as_slice);
    let total = within.iter().fold(1usize, |total, part| {
        total.saturating_add(size(part, parts, sizes))
    });
    sizes.insert(name, total);
    total
}

/// The text without what stands in strings, regular expressions and comments.
fn without_literals(lark: &str) -> String {
    let mut plain = String::new();
    let mut chars = lark.chars().peekable();
    while let Some(c) = chars.next() {
        let comment = c == '#' || (c == '/' && chars.peek() == Some(&'/'));
        if comment {
            while chars.next_if(|c| *c != '\n').is_some() {}
        } else if c == '"' || c == '/' {
            while let Some(inside) = chars.next_if(|inside| *inside != '\n') {
                match inside {
                    '\\' => drop(chars.next()),
                    inside if inside == c => break,
                    _ => {}
                }
            }
            // Flags of an expression are no name.
            while chars
                .next_if(|flag| c == '/' && flag.is_ascii_lowercase())
                .is_some()
            {}
            plain.push(' ');
        } else {
            plain.push(c);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_that_explode_are_found() {
        let chain = |depth: usize, body: &str| {
            let rule = |i: usize| format!("A{i}: {}\n", body.replace('A', &format!("A{}", i + 1)));
            let rules: String = (0..depth).map(rule).collect();
            format!("start: A0\n{rules}A{depth}: \"z\"\n")
        };
        check(&chain(5000, "A")).unwrap();
        check(&chain(10, "A A")).unwrap();
        check(&chain(60, "A")).unwrap();
        for (depth, body) in [(14, "A A"), (9, "A | A \"x:\" A"), (5000, "A\n  | A")] {
            let error = check(&chain(depth, body)).unwrap_err();
            assert!(error.contains("terminal"), "{error}");
        }
        // Rules may: they are not written out. Nor is what only looks like a name.
        check(&chain(60, "A A").replace('A', "a")).unwrap();
        check(&chain(60, "\"A A\" A /A A\\/A/i // A\n")).unwrap();
        check("start: A\nA: A A\n").unwrap();
    }
}

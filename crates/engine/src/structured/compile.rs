//! From what a request asks for to a grammar that can be followed.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{InferenceCapabilities, TokEnv};
use llguidance::{Matcher, ParserFactory, regex_to_lark};
use serde_json::{Map, Value, json};

use super::vocabulary::vocabulary;
use super::workbench::{Failure, PLACES, Workbench, lock};
use super::{
    Constraint, MAX_CONSTRAINT_BYTES, MAX_GRAMMAR_BYTES, MAX_REGEX_BYTES, MAX_SCHEMA_DEPTH,
    StructuredOutputs, terminals,
};
use crate::error::RequestError;
use crate::tokenizer::Tokenizer;

/// Compiled grammars that are kept: clients send the same schema over and over.
const KEPT: usize = 32;

/// What may stand between the parts of JSON: a space, or a new line and its indentation. Not more:
/// models that would rather say something else fill their answers with spaces where they may.
const WHITESPACE: &str = r"\x20|\r?\n[\x20\t]{0,20}";

/// Most characters of an error's cause: it may quote the grammar.
const LONGEST_CAUSE: usize = 500;

/// A grammar at its beginning, for one request.
pub(crate) struct Grammar {
    /// What every sequence of the request starts from.
    pub(super) start: Matcher,
    /// Tokens that end a sequence where the grammar may end. Empty if they are to be ignored.
    pub(super) eos: Vec<u32>,
    /// All of them, ignored or not.
    pub(super) all_eos: Vec<u32>,
    /// Before so many tokens the sampler bans `eos`.
    pub(super) min_tokens: u32,
    /// What ends the free text before the constrained one, if there is any.
    pub(super) after: Option<String>,
    pub(super) vocabulary: TokEnv,
}

impl Grammar {
    /// There is no free text.
    pub(crate) fn begin_at_once(&mut self) {
        self.after = None;
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").finish_non_exhaustive()
    }
}

/// Compiles grammars for one vocabulary. Shared by all callers.
pub(crate) struct Compiler {
    tokenizer: Arc<Tokenizer>,
    vocab_size: usize,
    eos: Vec<u32>,
    /// Made when it is first needed: it takes a while and memory for every token. `None` if this
    /// tokenizer cannot be used.
    factory: OnceLock<Option<Arc<ParserFactory>>>,
    bench: Workbench,
    kept: Arc<Mutex<Kept>>,
}

/// Grammars by what they were compiled from, the one that was used last at the end.
type Kept = VecDeque<(String, Matcher)>;

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiler").finish_non_exhaustive()
    }
}

impl Compiler {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, vocab_size: usize, eos: &[u32]) -> Self {
        Compiler {
            tokenizer,
            vocab_size,
            eos: eos.to_vec(),
            factory: OnceLock::new(),
            bench: Workbench::default(),
            kept: Arc::default(),
        }
    }

    /// The grammar of a request. Milliseconds for one that is new; never to be called on the
    /// engine's thread.
    pub(crate) fn compile(
        &self,
        wanted: &StructuredOutputs,
        ignore_eos: bool,
        min_tokens: u32,
    ) -> Result<Grammar, RequestError> {
        let param = wanted.param;
        let (source, key) = source(wanted).map_err(|cause| unusable(param, &cause))?;
        let factory = self.factory.get_or_init(|| self.make_factory());
        let factory = factory.as_ref().ok_or_else(|| {
            RequestError::unsupported(
                param,
                "structured outputs need a tokenizer whose tokens stand for bytes (byte-level BPE, \
                 or sentencepiece with byte fallback)",
            )
        })?;
        Ok(Grammar {
            start: self
                .matcher(factory, source, key)
                .map_err(|failure| match failure {
                    // What follows is llguidance's state, of no use to a client.
                    Failure::Cause(cause) => {
                        unusable(param, cause.split("\n<").next().unwrap_or_default())
                    }
                    Failure::Busy => RequestError::QueueFull {
                        limit: PLACES,
                        what: "grammars that take long to compile",
                    },
                })?,
            eos: match ignore_eos {
                true => Vec::new(),
                false => self.eos.clone(),
            },
            all_eos: self.eos.clone(),
            min_tokens,
            after: wanted.after.clone(),
            vocabulary: factory.tok_env().clone(),
        })
    }

    fn make_factory(&self) -> Option<Arc<ParserFactory>> {
        let vocabulary = vocabulary(&self.tokenizer, self.vocab_size, &self.eos)?;
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let made = ParserFactory::new(&vocabulary, InferenceCapabilities::default(), &slices);
        let mut factory = match made {
            Ok(factory) => factory,
            Err(error) => {
                tracing::error!("structured outputs cannot be used: {error}");
                return None;
            }
        };
        factory.quiet().limits_mut().verbose_errors = false;
        Some(Arc::new(factory))
    }

    fn matcher(
        &self,
        factory: &Arc<ParserFactory>,
        source: TopLevelGrammar,
        key: String,
    ) -> Result<Matcher, Failure> {
        if let Some(known) = known(&self.kept, &key) {
            return Ok(known);
        }
        let (factory, kept) = (factory.clone(), self.kept.clone());
        let compile = move || {
            // The one before may have been the same.
            if let Some(known) = known(&kept, &key) {
                return Ok(known);
            }
            let made = make(&factory, source)?;
            let copy = made.deep_clone();
            let mut kept = lock(&kept);
            if kept.len() == KEPT {
                kept.pop_front();
            }
            kept.push_back((key, made));
            Ok(copy)
        };
        self.bench.run(compile)?.map_err(Failure::Cause)
    }
}

/// A copy of a grammar that was kept. Its lexer is its own: sequences wait for no lock of other
/// requests'.
fn known(kept: &Mutex<Kept>, key: &str) -> Option<Matcher> {
    let mut kept = lock(kept);
    let at = kept.iter().position(|(known, _)| known == key)?;
    let entry = kept.remove(at)?;
    let copy = entry.1.deep_clone();
    kept.push_back(entry);
    Some(copy)
}

fn make(factory: &ParserFactory, source: TopLevelGrammar) -> Result<Matcher, String> {
    for grammar in &source.grammars {
        terminals::check(grammar.lark_grammar.as_deref().unwrap_or_default())?;
    }
    let parser = factory.create_parser(source).map_err(|e| e.to_string())?;
    let mut matcher = Matcher::new(Ok(parser));
    // What fails at its first token is refused now, and the copies have the first mask's states.
    let accepting = matcher.is_accepting().unwrap_or(false);
    match matcher.deep_clone().compute_mask() {
        Err(error) if !accepting => Err(match error.to_string() {
            cause if cause.contains("NoExtensionBias") => "no text matches it".to_owned(),
            cause => cause,
        }),
        _ => Ok(matcher),
    }
}

fn unusable(param: &'static str, cause: &str) -> RequestError {
    let mut cause = cause.trim().to_owned();
    if let Some((cut, _)) = cause.char_indices().nth(LONGEST_CAUSE) {
        cause.truncate(cut);
        cause.push('…');
    }
    RequestError::Grammar { param, cause }
}

/// The grammar in llguidance's terms, and what tells it from others.
fn source(wanted: &StructuredOutputs) -> Result<(TopLevelGrammar, String), String> {
    Ok(match &wanted.constraint {
        Constraint::Json(schema) => json_source(schema.clone(), wanted)?,
        Constraint::JsonObject => json_source(json!({"type": "object"}), wanted)?,
        Constraint::Regex(regex) => {
            let regex = without_anchors(regex);
            check_size(regex.len(), MAX_REGEX_BYTES)?;
            // `\d`, `\w` and `\s` are ASCII, as clients of other servers know them.
            let lark = format!("start: /{}/", regex_to_lark(regex, "dws"));
            let key = format!("lark {lark}");
            (TopLevelGrammar::from_lark(lark), key)
        }
        Constraint::Choice(choices) => {
            if choices.is_empty() {
                return Err("there is no choice".to_owned());
            }
            // Strings of Lark are strings of JSON. One terminal, and not as many rules as choices.
            let quoted: Vec<String> = choices.iter().map(|c| json!(c).to_string()).collect();
            let lark = format!("start: CHOICE\nCHOICE: {}", quoted.join(" | "));
            check_size(lark.len(), MAX_CONSTRAINT_BYTES)?;
            let key = format!("lark {lark}");
            (TopLevelGrammar::from_lark(lark), key)
        }
        Constraint::Grammar(lark) => {
            check_size(lark.len(), MAX_GRAMMAR_BYTES)?;
            if lark.trim().is_empty() {
                return Err("the grammar is empty".to_owned());
            }
            if lark.contains("::=") {
                return Err(
                    "`::=` is GBNF; write the grammar in Lark's notation (`start: …`)".to_owned(),
                );
            }
            let key = format!("lark {lark}");
            (TopLevelGrammar::from_lark(lark.clone()), key)
        }
    })
}

fn json_source(
    mut schema: Value,
    wanted: &StructuredOutputs,
) -> Result<(TopLevelGrammar, String), String> {
    if depth(&schema) > MAX_SCHEMA_DEPTH {
        return Err(format!(
            "the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep"
        ));
    }
    if let Value::Bool(any) = schema {
        // `true` describes anything, `false` nothing.
        schema = match any {
            true => json!({}),
            false => return Err("the schema `false` describes nothing".to_owned()),
        };
    }
    let Value::Object(object) = &mut schema else {
        return Err("a schema must be an object".to_owned());
    };
    if object.contains_key("x-guidance") {
        return Err("x-guidance is not part of JSON Schema".to_owned());
    }
    let mut options = Map::new();
    let pattern = match (&wanted.whitespace_pattern, wanted.disable_any_whitespace) {
        (Some(pattern), _) => Some(pattern.as_str()),
        (None, true) => None,
        (None, false) => Some(WHITESPACE),
    };
    options.insert("whitespace_flexible".to_owned(), json!(false));
    options.insert("whitespace_pattern".to_owned(), json!(pattern));
    object.insert("x-guidance".to_owned(), Value::Object(options));
    if wanted.disable_additional_properties {
        close(&mut schema);
    }
    let key = schema.to_string();
    check_size(key.len(), MAX_CONSTRAINT_BYTES)?;
    let longest = longest_text(&schema);
    if longest > MAX_REGEX_BYTES {
        return Err(format!(
            "a text in the schema has {longest} bytes; at most {MAX_REGEX_BYTES} are read"
        ));
    }
    Ok((
        TopLevelGrammar::from_json_schema(schema),
        format!("json {key}"),
    ))
}

fn check_size(bytes: usize, most: usize) -> Result<(), String> {
    match bytes <= most {
        true => Ok(()),
        false => Err(format!("it has {bytes} bytes; at most {most} are read")),
    }
}

/// Bytes of the longest text or name.
fn longest_text(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(longest_text).max().unwrap_or(0),
        Value::Object(map) => {
            let of = |(name, value): (&String, &Value)| name.len().max(longest_text(value));
            map.iter().map(of).max().unwrap_or(0)
        }
        _ => 0,
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Adds `"additionalProperties": false` wherever a schema names properties and says nothing of
/// others.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            let named = map.contains_key("properties") || map.contains_key("patternProperties");
            let open = ["additionalProperties", "unevaluatedProperties"];
            if named && !open.iter().any(|key| map.contains_key(*key)) {
                map.insert("additionalProperties".to_owned(), json!(false));
            }
            map.values_mut().for_each(close);
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

/// The whole text is matched anyway, and llguidance knows no anchors.
fn without_anchors(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    match regex.strip_suffix('$') {
        // An even number of backslashes escapes nothing but each other.
        Some(body) if (body.len() - body.trim_end_matches('\\').len()) % 2 == 0 => body,
        _ => regex,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_at_the_ends_go() {
        for (regex, expected) in [
            ("^a$", "a"),
            ("a", "a"),
            (r"a\$", r"a\$"),
            (r"a\\$", r"a\\"),
            ("^", ""),
            ("a^b", "a^b"),
        ] {
            assert_eq!(without_anchors(regex), expected);
        }
    }

    #[test]
    fn schemas_are_closed_where_they_are_silent() {
        let mut schema = json!({
            "properties": {"a": {"properties": {}, "additionalProperties": true}},
            "anyOf": [{"properties": {}}, {"type": "object"}],
        });
        close(&mut schema);
        assert_eq!(
            schema,
            json!({
                "properties": {"a": {"properties": {}, "additionalProperties": true}},
                "anyOf": [{"properties": {}, "additionalProperties": false}, {"type": "object"}],
                "additionalProperties": false,
            })
        );
    }
}

//! How the demo shows the engine: in place on a terminal, line by line elsewhere.

use std::fmt::Write as _;
use std::io::Write;

use batch_scheduler::SeqState;
use engine::{KvSnapshot, StepReport};
use paged_kv::BlockState;

use super::Conversation;
use crate::say::say;

/// Columns of the block map.
const MAP_COLUMNS: usize = 64;

/// Name of a sequence in the view: its request's number, as a letter on the block map.
pub fn letter(request: u64) -> char {
    char::from(b'A' + (request % 26) as u8)
}

/// What a step did, in words: who prefills, decodes, finishes, and who takes whose place.
pub fn events(report: &StepReport) -> Vec<String> {
    let mut lines = Vec::new();
    for (seq, _) in &report.finished {
        lines.push(format!("{} finished", letter(seq.request.0)));
    }
    for seq in &report.preempted {
        lines.push(format!("{} preempted", letter(seq.request.0)));
    }
    for a in &report.admitted {
        let mut line = format!("{} enters", letter(a.seq.request.0));
        if let Some(gone) = a.replaces {
            let _ = write!(line, " in the place of {}", letter(gone.request.0));
        }
        if a.num_cached > 0 {
            let _ = write!(line, " ({} tokens from the prefix cache)", a.num_cached);
        }
        lines.push(line);
    }
    lines
}

/// The sequences that compute in a step: `prefill A+64 B+31 · decode C D`.
pub fn rows(report: &StepReport) -> String {
    let (mut prefill, mut decode) = (String::new(), String::new());
    for row in &report.rows {
        let name = letter(row.seq.request.0);
        let _ = match row.decode {
            true => write!(decode, " {name}"),
            false => write!(prefill, " {name}+{}", row.len),
        };
    }
    let mut parts = Vec::new();
    if !prefill.is_empty() {
        parts.push(format!("prefill{prefill}"));
    }
    if !decode.is_empty() {
        parts.push(format!("decode{decode}"));
    }
    parts.join(" · ")
}

/// The blocks of the KV cache: a letter for its sequence, `*` shared by several, `-` cached and
/// waiting to be found, `.` free.
pub fn block_map(kv: &KvSnapshot) -> Vec<String> {
    let mut map: Vec<char> = kv
        .blocks
        .iter()
        .map(|state| match state {
            BlockState::Free => '.',
            BlockState::Cached => '-',
            BlockState::Referenced { .. } => '*',
        })
        .collect();
    for seq in &kv.sequences {
        for block in &seq.blocks {
            // Block ids count from 1.
            if let Some(at) = (block.get() as usize).checked_sub(1)
                && let Some(BlockState::Referenced { readers: 1, .. }) = kv.blocks.get(at)
            {
                map[at] = letter(seq.id.0);
            }
        }
    }
    map.chunks(MAP_COLUMNS)
        .map(|row| row.iter().collect())
        .collect()
}

/// Prints one line for each step, decode-only steps in a row as one, and answers as they end.
#[derive(Default)]
pub struct Plain {
    /// First and last step, and the sequences, of a run of steps with nothing but decoding.
    quiet: Option<(u64, u64, String)>,
}

impl Plain {
    pub fn step(&mut self, report: &StepReport, kv: &KvSnapshot) -> anyhow::Result<()> {
        let (events, rows) = (events(report), rows(report));
        let Some(step) = report.step else {
            return events
                .iter()
                .try_for_each(|e| say(format_args!("          {e}")));
        };
        if events.is_empty() && !rows.contains("prefill") {
            match &mut self.quiet {
                Some((_, last, same)) if *same == rows => *last = step,
                _ => {
                    self.flush()?;
                    self.quiet = Some((step, step, rows));
                }
            }
            return Ok(());
        }
        self.flush()?;
        for event in &events {
            say(format_args!("          {event}"))?;
        }
        say(format_args!("step {step:4} {rows}"))?;
        if !report.admitted.is_empty() {
            for row in block_map(kv) {
                say(format_args!("   blocks {row}"))?;
            }
        }
        Ok(())
    }

    pub fn answer(&mut self, request: u64, conversation: &Conversation) -> anyhow::Result<()> {
        self.flush()?;
        say(format_args!(
            "\n  {} {}\n    {}\n",
            letter(request),
            conversation.question.text,
            conversation.text.trim().replace('\n', "\n    ")
        ))
    }

    pub fn flush(&mut self) -> anyhow::Result<()> {
        match self.quiet.take() {
            None => Ok(()),
            Some((first, last, rows)) if first == last => {
                say(format_args!("step {first:4} {rows}"))
            }
            Some((first, last, rows)) => {
                say(format_args!("step {first:4} {rows}  … to step {last}"))
            }
        }
    }
}

/// Draws the engine in place.
#[derive(Default)]
pub struct Live {
    drawn: usize,
    recent: Vec<String>,
}

impl Live {
    pub fn step(&mut self, report: &StepReport, kv: &KvSnapshot, conversations: &[Conversation]) {
        let step = report.step.unwrap_or(report.stats.last_step.step);
        self.recent.extend(
            events(report)
                .into_iter()
                .map(|e| format!("step {step}: {e}")),
        );
        let extra = self.recent.len().saturating_sub(4);
        self.recent.drain(..extra);

        let s = &report.stats;
        let mut lines = vec![format!(
            "\x1b[1mstep {step}\x1b[0m   running {} · waiting {} · KV blocks {}/{} ({} shared) · prefix hits {:.0} %",
            s.running,
            s.waiting,
            s.kv_used_blocks,
            s.kv_total_blocks,
            kv.num_shared(),
            100.0 * s.prefix_hit_rate()
        )];
        for (request, c) in conversations.iter().enumerate() {
            let seq = kv.sequences.iter().find(|seq| seq.id.0 == request as u64);
            let (colour, state) = match (c.done, seq.map(|seq| seq.state)) {
                (true, _) => ("32", "FINISHED"),
                (_, Some(SeqState::Running)) => ("36", "RUNNING"),
                (_, Some(SeqState::Prefill)) => ("33", "PREFILL"),
                (_, Some(SeqState::Preempted)) => ("31", "PREEMPTED"),
                _ => ("90", "WAITING"),
            };
            let shown = match c.text.is_empty() {
                true => format!("\x1b[90m{}\x1b[0m", head(&c.question.text, 60)),
                false => tail(&c.text, 60),
            };
            lines.push(format!(
                "\x1b[{colour}m{} {state:9}\x1b[0m {shown}",
                letter(request as u64)
            ));
        }
        lines.push(
            "\x1b[90mblocks: letter = sequence, * = shared, - = cached, . = free\x1b[0m".to_owned(),
        );
        lines.extend(block_map(kv));
        for at in 0..4 {
            lines.push(self.recent.get(at).cloned().unwrap_or_default());
        }
        let mut out = String::new();
        if self.drawn > 0 {
            let _ = write!(out, "\x1b[{}A", self.drawn);
        }
        for line in &lines {
            let _ = writeln!(out, "\x1b[2K{line}");
        }
        self.drawn = lines.len();
        let mut stdout = std::io::stdout().lock();
        // A terminal that went away is no reason to stop.
        let _ = stdout
            .write_all(out.as_bytes())
            .and_then(|()| stdout.flush());
    }
}

fn one_line(text: &str) -> Vec<char> {
    text.trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

fn head(text: &str, width: usize) -> String {
    one_line(text).into_iter().take(width).collect()
}

fn tail(text: &str, width: usize) -> String {
    let chars = one_line(text);
    chars[chars.len().saturating_sub(width)..].iter().collect()
}

//! Prometheus' older text format, which is what vLLM answers unless a scraper asks for OpenMetrics.

/// Its media type.
pub const MEDIA: &str = "text/plain; version=0.0.4; charset=utf-8";

/// `text`, in OpenMetrics' format, in the older one: a counter's name ends with `_total` where it is
/// described, too, and nothing marks the end.
pub fn from_openmetrics(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // Says what the next line's metric is, which has a type.
    let mut help = None;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let Some((name, kind)) = rest.split_once(' ') else {
                continue;
            };
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some((_, help)) = help.take() {
                out += &format!("# HELP {name}{suffix} {help}\n");
            }
            out += &format!("# TYPE {name}{suffix} {kind}\n");
        } else if !line.starts_with('#') {
            out += line;
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn counters_are_described_under_their_whole_name() {
        let text = "# HELP a Of a thing.\n# TYPE a counter\n# UNIT a seconds\na_total{b=\"# c\"} 1\n\
                    # HELP b_total Sizes.\n# TYPE b_total histogram\nb_total_sum 2.5\n# EOF\n";
        let expected = "# HELP a_total Of a thing.\n# TYPE a_total counter\na_total{b=\"# c\"} 1\n\
                        # HELP b_total Sizes.\n# TYPE b_total histogram\nb_total_sum 2.5\n";
        assert_eq!(super::from_openmetrics(text), expected);
    }
}

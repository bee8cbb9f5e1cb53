//! The plot: which share of the requests had its first token after how long.

use std::fmt::Write;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const MARGIN: f64 = 56.0;
const COLORS: [&str; 5] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#555555"];

/// Cumulative distributions over a logarithmic time axis; each curve is sorted.
pub fn cumulative(curves: &[(String, Vec<f64>)]) -> String {
    let seen = |f: fn(f64, f64) -> f64, start| {
        let all = curves.iter().flat_map(|(_, ttft)| ttft.iter().copied());
        all.fold(start, f)
    };
    let first = seen(f64::min, 1e3).max(1e-4).log10().floor();
    let last = seen(f64::max, 1e-3).log10().ceil().max(first + 1.0);
    let x = |seconds: f64| {
        let share = (seconds.max(1e-4).log10() - first) / (last - first);
        MARGIN + share * (WIDTH - 2.0 * MARGIN)
    };
    let y = |share: f64| HEIGHT - MARGIN - share * (HEIGHT - 2.0 * MARGIN);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    // Writing to a string cannot fail.
    let mut draw = |line: std::fmt::Arguments<'_>| {
        let _ = writeln!(svg, "{line}");
    };
    for exponent in first as i32..=last as i32 {
        let (at, seconds) = (x(10f64.powi(exponent)), 10f64.powi(exponent));
        let (top, bottom) = (y(1.0), y(0.0));
        draw(format_args!(
            "<path d=\"M{at:.1} {top}V{bottom}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{seconds} s</text>",
            bottom + 20.0
        ));
    }
    for quarter in 0..=4 {
        let share = f64::from(quarter) / 4.0;
        let (at, left, right) = (y(share), MARGIN, WIDTH - MARGIN);
        draw(format_args!(
            "<path d=\"M{left} {at:.1}H{right}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{} %</text>",
            left - 8.0,
            at + 4.0,
            share * 100.0
        ));
    }
    draw(format_args!(
        "<text x=\"{}\" y=\"30\" text-anchor=\"middle\" font-size=\"15\">\
         Requests with a first token within …</text>",
        WIDTH / 2.0
    ));
    for (i, (name, ttft)) in curves.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        // Some 400 points show all that the eye can see.
        let stride = (ttft.len() / 400).max(1);
        let points: Vec<String> = (0..ttft.len())
            .step_by(stride)
            .chain(ttft.len().checked_sub(1))
            .map(|at| {
                let share = (at + 1) as f64 / ttft.len() as f64;
                format!("{:.1},{:.1}", x(ttft[at]), y(share))
            })
            .collect();
        draw(format_args!(
            "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"2\" points=\"{}\"/>\
             <text x=\"{}\" y=\"{}\" fill=\"{color}\">{name}</text>",
            points.join(" "),
            MARGIN + 12.0,
            MARGIN + 18.0 * (i + 1) as f64
        ));
    }
    svg + "</svg>\n"
}

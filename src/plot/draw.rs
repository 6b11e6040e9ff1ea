//! Charts as SVG. Colours are attributes for a light page; a style sheet in the file exchanges them where the reader's page is dark.

use std::fmt::Display;
use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::panels::{Colour, Line, Panel, Point, Series};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Width and height of a chart in pixels.
const CHART: (u32, u32) = (520, 340);
const MARGIN: i32 = 12;
/// Height of a line of the legend or the caption.
const LINE: i32 = 20;
const FONT: &str = "sans-serif";
const SMALL: i32 = 16;
/// Roughly, of that font at that size.
const CHARACTER: i32 = 7;
/// Of the sample of a line in the legend.
const SAMPLE: i32 = 26;
/// Marks that are nearer than this, in powers of two, would overlap.
const NEAREST: f64 = 0.3;
/// Room before the first and behind the last, in powers of two.
const SIDE: f64 = 0.2;

const BACKGROUND: RGBColor = RGBColor(0xff, 0xff, 0xff);
const TEXT: RGBColor = RGBColor(0x24, 0x29, 0x2f);
const QUIET: RGBColor = RGBColor(0x57, 0x60, 0x6a);
const GRID: RGBColor = RGBColor(0xd8, 0xde, 0xe4);

/// Each colour, and what it is on a dark page.
const PALETTE: [(RGBColor, &str); 14] = [
    (BACKGROUND, "#0D1117"),
    (TEXT, "#E6EDF3"),
    (QUIET, "#9EA7B3"),
    (GRID, "#30363D"),
    (colour(Line::Split), "#F0883E"),
    (colour(Line::SplitInOrder), "#E3B341"),
    (colour(Line::Packed), "#58A6FF"),
    (colour(Line::PackedInOrder), "#3FB950"),
    (colour(Line::DpdkVhost), "#BC8CFF"),
    (colour(Line::DpdkSwitch), "#79C0FF"),
    (colour(Line::Memif), "#FF7B72"),
    (colour(Line::MemifZc), "#39C5CF"),
    (colour(Line::Relay), "#FF9BCE"),
    (colour(Line::Veth), "#B0B8C1"),
];

const fn colour(line: Line) -> RGBColor {
    match line {
        Line::Split => RGBColor(0xbc, 0x4c, 0x00),
        Line::SplitInOrder => RGBColor(0xa0, 0x76, 0x00),
        Line::Packed => RGBColor(0x09, 0x69, 0xda),
        Line::PackedInOrder => RGBColor(0x1a, 0x7f, 0x37),
        Line::DpdkVhost => RGBColor(0x82, 0x50, 0xdf),
        Line::DpdkSwitch => RGBColor(0x3b, 0x5f, 0x9a),
        Line::Memif => RGBColor(0xcf, 0x22, 0x2e),
        Line::MemifZc => RGBColor(0x1b, 0x7c, 0x83),
        Line::Relay => RGBColor(0xbf, 0x39, 0x89),
        Line::Veth => RGBColor(0x6e, 0x77, 0x81),
    }
}

fn failed(error: impl Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

/// All charts in one picture, with one legend and one caption.
pub fn figure(panels: &[Panel], caption: &[String]) -> Result<String> {
    let columns = panels.len().clamp(1, 2);
    let rows = panels.len().div_ceil(columns);
    let (columns, rows) = (u32::try_from(columns)?, u32::try_from(rows)?);
    let width = columns * CHART.0;
    let legend = Legend::new(panels, i32::try_from(width)?);
    let foot = LINE * i32::try_from(caption.len())? + MARGIN;
    let height = rows * CHART.1 + u32::try_from(legend.height() + foot)?;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        root.fill(&BACKGROUND).map_err(failed)?;
        let (head, rest) = root.split_vertically(legend.height());
        let (charts, foot) = rest.split_vertically(rows * CHART.1);
        legend.draw(&head)?;
        let areas = charts.split_evenly((rows as usize, columns as usize));
        for (panel, area) in panels.iter().zip(&areas) {
            if panel.bars.is_empty() {
                chart(panel, area)?;
            } else {
                bars(panel, area)?;
            }
        }
        for (line, text) in (0..).zip(caption) {
            write(&foot, text, (MARGIN, LINE * line), &QUIET)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(styled(&svg))
}

/// With the colours of a dark page.
fn styled(svg: &str) -> String {
    let mut rules = String::new();
    for (RGBColor(red, green, blue), dark) in PALETTE {
        let light = format!("#{red:02X}{green:02X}{blue:02X}");
        rules.push_str(&format!(
            "[fill=\"{light}\"]{{fill:{dark}}}[stroke=\"{light}\"]{{stroke:{dark}}}\n"
        ));
    }
    let style = format!("<style>\n@media (prefers-color-scheme:dark){{\n{rules}}}\n</style>\n");
    match svg.split_once(">\n") {
        Some((open, rest)) => format!("{open}>\n{style}{rest}"),
        None => svg.to_owned(),
    }
}

fn write(area: &Area, text: &str, at: (i32, i32), colour: &RGBColor) -> Result<()> {
    let style = (FONT, SMALL).into_font().color(colour);
    area.draw(&Text::new(text.to_owned(), at, style))
        .map_err(failed)
}

/// What the lines mean: items from the left to the right, in as many lines as they need.
struct Legend {
    items: Vec<(Item, (i32, i32))>,
    lines: i32,
}

#[derive(Clone, Copy)]
enum Item {
    Line(Line),
    Measured,
    Bound,
}

impl Item {
    fn text(self) -> &'static str {
        match self {
            Self::Line(line) => line.name(),
            Self::Measured => "from VM to VM",
            Self::Bound => "upper bound: two host threads",
        }
    }
}

impl Legend {
    fn new(panels: &[Panel], width: i32) -> Self {
        let all = || panels.iter().flat_map(|panel| &panel.series);
        let mut lines: Vec<Line> = all().map(|series| series.line).collect();
        lines.sort_unstable();
        lines.dedup();
        let mut items: Vec<Item> = lines.into_iter().map(Item::Line).collect();
        if all().any(|series| series.bound) {
            items.extend([Item::Measured, Item::Bound]);
        }
        let (mut x, mut line) = (MARGIN, 0);
        let mut placed = Vec::new();
        for item in items {
            let characters = i32::try_from(item.text().len()).unwrap_or(0);
            let length = SAMPLE + 3 * MARGIN + CHARACTER * characters;
            if x > MARGIN && x + length > width {
                (x, line) = (MARGIN, line + 1);
            }
            placed.push((item, (x, MARGIN + LINE * line)));
            x += length;
        }
        Self {
            items: placed,
            lines: line + 1,
        }
    }

    fn height(&self) -> i32 {
        MARGIN + LINE * self.lines
    }

    fn draw(&self, area: &Area) -> Result<()> {
        for &(item, (x, y)) in &self.items {
            let (from, to) = ((x, y + SMALL / 2), (x + SAMPLE, y + SMALL / 2));
            match item {
                Item::Line(line) => {
                    let path = PathElement::new([from, to], colour(line).stroke_width(2));
                    area.draw(&path).map_err(failed)?;
                    let middle = (x + SAMPLE / 2, from.1);
                    area.draw(&mark(line, middle)).map_err(failed)?;
                }
                Item::Measured => area
                    .draw(&PathElement::new([from, to], QUIET.stroke_width(2)))
                    .map_err(failed)?,
                Item::Bound => {
                    for dash in 0..3 {
                        let start = x + 10 * dash;
                        let points = [(start, from.1), (start + 6, from.1)];
                        area.draw(&PathElement::new(points, QUIET.stroke_width(1)))
                            .map_err(failed)?;
                    }
                }
            }
            write(area, item.text(), (x + SAMPLE + MARGIN / 2, y), &TEXT)?;
        }
        Ok(())
    }
}

/// A line's mark: larger with VIRTIO_F_IN_ORDER, so that the colour alone does not tell; largest for peers.
fn mark<C>(line: Line, at: C) -> Circle<C, i32> {
    let size = match line {
        Line::Split | Line::Packed => 2,
        Line::SplitInOrder | Line::PackedInOrder => 4,
        Line::DpdkVhost
        | Line::DpdkSwitch
        | Line::Memif
        | Line::MemifZc
        | Line::Relay
        | Line::Veth => 6,
    };
    Circle::new(at, size, colour(line).filled())
}

fn chart(panel: &Panel, area: &Area) -> Result<()> {
    let axis = Powers::new(&panel.ticks);
    let points = panel.series.iter().flat_map(|series| &series.points);
    let most = points.map(|point| point.max).fold(0.0, f64::max);
    let top = if most > 0.0 { most * 1.06 } else { 1.0 };

    let title = (FONT, 20).into_font().color(&TEXT);
    let label = (FONT, SMALL).into_font();
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, title)
        .margin(MARGIN)
        .x_label_area_size(48)
        .y_label_area_size(58)
        .build_cartesian_2d(axis, 0.0..top)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(QUIET)
        .x_desc(panel.x)
        .y_desc(panel.y)
        .axis_desc_style(label.color(&TEXT))
        .label_style(label.color(&QUIET))
        .x_label_formatter(&|x| format!("{:.0}", x.exp2()))
        .y_labels(6)
        .y_label_formatter(&|y| amount(*y, top))
        .draw()
        .map_err(failed)?;
    for series in &panel.series {
        line(&mut chart, series)?;
    }
    Ok(())
}

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Powers, RangedCoordf64>>;

fn line(chart: &mut Chart, series: &Series) -> Result<()> {
    let colour = colour(series.line);
    let at = |point: &Point| (place(point.x), point.y);
    let points = series.points.iter().map(at);
    if series.bound {
        let dashed = DashedLineSeries::new(points, 6, 4, colour.stroke_width(1));
        chart.draw_series(dashed).map_err(failed)?;
        return Ok(());
    }
    let spread = series.points.iter().map(|point| {
        let x = place(point.x);
        PathElement::new([(x, point.min), (x, point.max)], colour.stroke_width(1))
    });
    chart.draw_series(spread).map_err(failed)?;
    chart
        .draw_series(LineSeries::new(points, colour.stroke_width(2)))
        .map_err(failed)?;
    let marks = series
        .points
        .iter()
        .map(|point| mark(series.line, at(point)));
    chart.draw_series(marks).map_err(failed)?;
    Ok(())
}

/// Where the bars of a chart begin, from the left, and how much room is behind the longest, for its number.
const BARS: (i32, i32) = (265, 60);
/// Of what stands beside a bar.
const SMALLER: i32 = 14;
/// Height of a bar with the room around it, at most.
const BAR: i32 = 30;
/// Values that are further apart than this need a logarithmic scale.
const WIDE: f64 = 50.0;

fn bars(panel: &Panel, area: &Area) -> Result<()> {
    let (width, height) = (i32::try_from(CHART.0)?, i32::try_from(CHART.1)?);
    let values = || panel.bars.iter().flat_map(|bar| [bar.min, bar.max]);
    let most = values().fold(0.0, f64::max);
    let least = values().fold(f64::INFINITY, f64::min);
    let scale = Scale::new(least, most, f64::from(width - BARS.0 - BARS.1 - MARGIN));

    let title = (FONT, 20).into_font().color(&TEXT);
    area.draw(&Text::new(panel.title.clone(), (MARGIN, MARGIN), title))
        .map_err(failed)?;
    let first = MARGIN + 2 * LINE;
    let count = i32::try_from(panel.bars.len())?;
    let step = ((height - first - 2 * LINE) / count.max(1)).min(BAR);
    for (index, bar) in (0..).zip(&panel.bars) {
        let top = first + step * index;
        let (middle, text) = (top + step / 2, top + (step - SMALL) / 2);
        let fill = match bar.colour {
            Colour::Line(line) => colour(line),
            Colour::Quiet => QUIET,
        };
        let end = BARS.0 + scale.length(bar.value);
        let style = (FONT, SMALLER).into_font().color(&TEXT);
        area.draw(&Text::new(bar.label.clone(), (MARGIN, text), style))
            .map_err(failed)?;
        let bar_top = top + step / 6;
        let shape = Rectangle::new(
            [(BARS.0, bar_top), (end, top + step - step / 6)],
            fill.filled(),
        );
        area.draw(&shape).map_err(failed)?;
        let spread = [bar.min, bar.max].map(|value| (BARS.0 + scale.length(value), middle));
        if bar.min < bar.max {
            area.draw(&PathElement::new(spread, TEXT.stroke_width(1)))
                .map_err(failed)?;
        }
        let behind = end.max(spread[1].0) + MARGIN / 2;
        write(area, &number(bar.value), (behind, text), &QUIET)?;
    }
    let foot = match scale {
        Scale::Linear { .. } => panel.x.to_owned(),
        Scale::Logarithmic { .. } => format!("{}; logarithmic", panel.x),
    };
    let below = first + step * count + MARGIN / 2;
    write(area, &foot, (BARS.0, below), &QUIET)
}

/// How long a bar is, in pixels.
#[derive(Clone, Copy, Debug)]
enum Scale {
    Linear { most: f64, room: f64 },
    Logarithmic { from: f64, decades: f64, room: f64 },
}

impl Scale {
    /// For values from `least`, which is above 0, to `most`.
    fn new(least: f64, most: f64, room: f64) -> Self {
        if most <= WIDE * least {
            return Self::Linear { most, room };
        }
        let from = least.log10().floor();
        let decades = most.log10() - from;
        Self::Logarithmic {
            from,
            decades,
            room,
        }
    }

    fn length(self, value: f64) -> i32 {
        let pixels = match self {
            Self::Linear { most, room } => value / most * room,
            Self::Logarithmic {
                from,
                decades,
                room,
            } => (value.log10() - from) / decades * room,
        };
        #[expect(clippy::cast_possible_truncation, reason = "a pixel is meant")]
        let pixels = pixels.round() as i32;
        pixels.max(1)
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    let digits = match value {
        _ if value >= 100.0 => 0,
        _ if value >= 10.0 => 1,
        _ if value >= 0.1 => 2,
        _ => 5,
    };
    format!("{value:.digits$}")
}

/// Where a number is on the x axis.
fn place(x: u32) -> f64 {
    f64::from(x).log2()
}

/// The x axis, in powers of two, and where it is marked.
struct Powers {
    range: Range<f64>,
    marks: Vec<f64>,
}

impl Powers {
    fn new(ticks: &[u32]) -> Self {
        let all: Vec<f64> = ticks.iter().map(|&x| place(x)).collect();
        let mut marks: Vec<f64> = Vec::new();
        for &place in &all {
            if marks.last().is_none_or(|last| place - last >= NEAREST) {
                marks.push(place);
            }
        }
        let first = all.first().copied().unwrap_or(0.0);
        let last = all.last().copied().unwrap_or(first);
        Self {
            range: first - SIDE..last + SIDE,
            marks,
        }
    }
}

impl Ranged for Powers {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let part = (value - self.range.start) / (self.range.end - self.range.start);
        // Between `from` and `to` if the value is in the range, and saturated if not.
        #[expect(clippy::cast_possible_truncation, reason = "a pixel is meant")]
        let offset = (part * f64::from(to - from)).round() as i32;
        from.saturating_add(offset)
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.marks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// A label of the y axis that ends at `top`.
fn amount(y: f64, top: f64) -> String {
    let digits = if top < 2.0 {
        2
    } else if top < 12.0 {
        1
    } else {
        0
    };
    format!("{y:.digits$}")
}

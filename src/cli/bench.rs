//! `isopleth bench`: how fast attention, a model or a training step runs here, and how fast it could.

use clap::builder::PossibleValuesParser;

use super::{
    environment::{self, for_training},
    map::round,
    say,
};
use crate::{
    attention::Precision,
    bench::{Attention, Layout, Plan, Report, accuracy, layer, network, step},
    device,
    error::{Error, Result},
    model::{self, tnp_kr::Config},
};

/// Measure the speed of attention, a model or a training step here (for scores: `benchmark`)
#[derive(clap::Args)]
#[command(after_help = "\
Head pairs count how often a score stands between a query and a key: heads × context² for every layer \
but the last (which no later one reads), and heads × context × targets for every layer.
GFLOP/s count useful arithmetic of the attention alone: 2 (d + w) per head pair, d and w being the widths \
of key and value; three times that in a training step. Everything else a model does is time and no work.
The ceiling is measured in the same run, every thread running: (d + w) multiply-adds at full speed, then \
one exponential at full speed, and nothing for the bias. Its share is that time over the measured one.
The stock operations of `train-step` hold every score of every layer: some 4 GiB at its default sizes.
For deep kernel attention, which forms no pairs, work is what its dense layers and its matrix compute.")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    Attention(LayerArgs),
    Condition(ConditionArgs),
    Map(MapArgs),
    TrainStep(StepArgs),
    Accuracy(AccuracyArgs),
}

/// How far attention is from full attention in f64: every bias family, and extreme scores
#[derive(clap::Args)]
struct AccuracyArgs {
    #[command(flatten)]
    run: Run,
}

/// How to run.
#[derive(clap::Args)]
struct Run {
    /// Threads; all cores when left out
    #[arg(long, value_name = "N", value_parser = count)]
    threads: Option<usize>,
    /// Where to compute: cpu, cuda or cuda:1
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: String,
    /// Numbers that attention computes with. bf16: keys and values of 16 bits, for scan and sparse
    /// attention that is asked, not trained; tf32: the same on a GPU, with 19 bits, and scan only
    #[arg(long, default_value = "f32", value_parser = PossibleValuesParser::new(["f32", "tf32", "bf16"]))]
    precision: String,
    /// With --attention sparse: the share of its attention that a query may lose
    #[arg(long, value_name = "SHARE", default_value_t = 1e-3)]
    lose: f64,
    /// Seed of everything random
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs, of which the best counts
    #[arg(long, value_name = "N", value_parser = count)]
    repeat: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What the context looks like.
#[derive(clap::Args)]
struct Context {
    /// Context sites: 10000, 100K, 1M
    #[arg(long, default_value = "10K", value_name = "N", value_parser = count)]
    contexts: usize,
    /// Where they lie: anywhere, in clumps, or on a lattice. Targets are the pixels of a map
    #[arg(long, default_value = "uniform", value_parser = ["uniform", "clustered", "lattice"])]
    layout: String,
}

/// Sizes of attention, where they are not a trained model's.
#[derive(clap::Args)]
struct Sizes {
    /// How attention is computed: scan, dka, full or sparse; scan when left out, or the model's own
    #[arg(long, value_parser = ["scan", "dka", "full", "sparse"])]
    attention: Option<String>,
    /// Heads [default: 4]
    #[arg(long, value_name = "N", value_parser = count)]
    heads: Option<usize>,
    /// Key width of a head [default: 32]
    #[arg(long, value_name = "WIDTH", value_parser = count)]
    key_width: Option<usize>,
    /// Value width of a head [default: 32]
    #[arg(long, value_name = "WIDTH", value_parser = count)]
    value_width: Option<usize>,
    /// Terms of the distance bias (`isopleth list terms`), or none [default: rbf]
    #[arg(long, value_name = "TERMS", value_delimiter = ',')]
    bias: Option<Vec<String>>,
    /// Widest and narrowest length scale of the bias, model units: sites span 2 [default: 1.5,0.05;
    /// supports of compact kernels 3,0.3]
    #[arg(long, value_name = "WIDE,NARROW", value_delimiter = ',', num_args = 1..=2)]
    reach: Option<Vec<f64>>,
}

/// Time one layer's attention, on random queries, keys and values
#[derive(clap::Args)]
struct LayerArgs {
    #[command(flatten)]
    context: Context,
    /// Targets: 10000, 100K, 1M
    #[arg(long, default_value = "10K", value_name = "N", value_parser = count)]
    targets: usize,
    #[command(flatten)]
    sizes: Sizes,
    #[command(flatten)]
    run: Run,
}

/// A model.
#[derive(clap::Args)]
struct ModelArgs {
    /// Trained model by name or file; random weights when left out
    #[arg(long, value_name = "NAME|FILE",
        conflicts_with_all = ["layers", "heads", "key_width", "value_width", "bias", "reach"])]
    model: Option<String>,
    /// Layers [default: 6]
    #[arg(long, value_name = "N", value_parser = count)]
    layers: Option<usize>,
    #[command(flatten)]
    sizes: Sizes,
}

/// Time the encoding of a context by a whole model
#[derive(clap::Args)]
struct ConditionArgs {
    #[command(flatten)]
    context: Context,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: Run,
}

/// Time a map by a whole model: the encoding, then every pixel, without files
#[derive(clap::Args)]
struct MapArgs {
    #[command(flatten)]
    context: Context,
    /// Pixels: 10000, 100K, 1M
    #[arg(long, default_value = "100K", value_name = "N", value_parser = count)]
    targets: usize,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    run: Run,
}

/// Time a training step (forward, backward, AdamW), and the same step from stock operations
#[derive(clap::Args)]
struct StepArgs {
    /// Tasks in a batch
    #[arg(long, default_value = "16", value_name = "N", value_parser = count)]
    batch: usize,
    /// Context sites of a task
    #[arg(long, default_value = "256", value_name = "N", value_parser = count)]
    contexts: usize,
    /// Targets of a task
    #[arg(long, default_value = "256", value_name = "N", value_parser = count)]
    targets: usize,
    /// Only the stock operations: composed layers and the whole score matrix
    #[arg(long, conflicts_with = "fused")]
    plain: bool,
    /// Only the step as `isopleth train` does it
    #[arg(long)]
    fused: bool,
    /// Layers [default: 6]
    #[arg(long, value_name = "N", value_parser = count)]
    layers: Option<usize>,
    #[command(flatten)]
    sizes: Sizes,
    #[command(flatten)]
    run: Run,
}

/// Measures, and prints a table or JSON.
///
/// # Errors
/// [`Error::Input`] for sizes that make no model, or what this build or machine cannot do.
pub fn run(args: &Args) -> Result<()> {
    let (run, report) = match &args.what {
        What::Attention(args) => (&args.run, attention(args)?),
        What::Condition(args) => (&args.run, condition(args)?),
        What::Map(args) => (&args.run, map(args)?),
        What::TrainStep(args) => (&args.run, train_step(args)?),
        What::Accuracy(args) => return accuracy(args),
    };
    match run.json {
        true => say(serde_json::to_string(&report).expect("a report is plain data")),
        false => table(&report),
    }
}

fn attention(args: &LayerArgs) -> Result<Report> {
    let config = args.sizes.config(None)?;
    let attention = args.sizes.attention().unwrap_or(Attention::Scan);
    let plan = args.run.plan(3)?;
    let layer = layer::Layer {
        attention,
        contexts: args.context.contexts,
        targets: args.targets,
        heads: config.heads,
        key_width: config.key_width,
        value_width: config.value_width,
        bias: if attention == Attention::Dka { vec![] } else { config.bias },
        reach: config.bias_reach,
        layout: args.context.layout(),
    };
    layer::run(&plan, &layer)
}

fn condition(args: &ConditionArgs) -> Result<Report> {
    let plan = args.run.plan(1)?;
    let network = args.model.network(&plan)?;
    network::condition(&plan, &network, args.context.layout(), args.context.contexts)
}

fn map(args: &MapArgs) -> Result<Report> {
    let plan = args.run.plan(1)?;
    let network = args.model.network(&plan)?;
    network::map(&plan, &network, args.context.layout(), args.context.contexts, args.targets)
}

fn train_step(args: &StepArgs) -> Result<Report> {
    // As in arXiv:2506.09163: one Gaussian, of the surface.
    let mut table = args.sizes.table(args.layers)?;
    table.insert("head".into(), toml::Table::from_iter([("nugget".into(), false.into())]).into());
    for_training()?;
    let plan = args.run.plan(3)?;
    let step = step::Step {
        batch: args.batch,
        contexts: args.contexts,
        targets: args.targets,
        fused: !args.plain,
        plain: !args.fused,
    };
    let attention = args.sizes.attention().unwrap_or(Attention::Scan);
    step::run(&plan, &step, attention, |attention| {
        network::Network::trainable(&plan, &table, attention)
    })
}

fn accuracy(args: &AccuracyArgs) -> Result<()> {
    let found = accuracy::run(&args.run.plan(1)?)?;
    if args.run.json {
        return say(serde_json::to_string(&found).expect("a report is plain data"));
    }
    for case in &found.cases {
        line(&case.name, format!("{:.1e}, allowed {:.0e}", case.error, case.gate))?;
    }
    line("all", if found.passed { "within what is allowed" } else { "NOT within what is allowed" })
}

impl Run {
    fn plan(&self, repeat: usize) -> Result<Plan> {
        if !(0.0..1.0).contains(&self.lose) {
            return Err(Error::input("a share lies between 0 and 1")
                .fact("--lose", self.lose)
                .try_this("give --lose 1e-3"));
        }
        let threads = self.threads.unwrap_or_else(rayon::current_num_threads);
        set_threads(self.threads)?;
        Ok(Plan {
            device: device::open(&self.device)?,
            device_name: self.device.clone(),
            precision: Precision::called(&self.precision).unwrap_or_default(),
            threads,
            seed: self.seed,
            repeat: self.repeat.unwrap_or(repeat),
            lose: self.lose,
        })
    }
}

impl Context {
    fn layout(&self) -> Layout {
        match self.layout.as_str() {
            "clustered" => Layout::Clustered,
            "lattice" => Layout::Lattice,
            _ => Layout::Uniform,
        }
    }
}

impl Sizes {
    fn attention(&self) -> Option<Attention> {
        self.attention.as_deref().map(|name| match name {
            "dka" => Attention::Dka,
            "full" => Attention::Full,
            "sparse" => Attention::Sparse,
            _ => Attention::Scan,
        })
    }

    /// The `[model]` table that these sizes are, without the kind.
    fn table(&self, layers: Option<usize>) -> Result<toml::Table> {
        let sizes = [
            ("blocks", layers),
            ("heads", self.heads),
            ("key_width", self.key_width),
            ("value_width", self.value_width),
        ];
        let given = |(name, size): &(&str, Option<usize>)| {
            size.map(|n| (name.to_string(), toml::Value::from(n as i64)))
        };
        let mut table: toml::Table = sizes.iter().filter_map(given).collect();
        if let Some(terms) = &self.bias {
            let terms = if terms == &["none"] { Vec::new() } else { terms.clone() };
            table.insert("bias".into(), terms.into());
        }
        if let Some(reach) = &self.reach {
            let [wide, narrow] = [reach[0], reach[reach.len() - 1]];
            table.insert("bias_reach".into(), vec![wide, narrow].into());
        }
        if self.attention() == Some(Attention::Dka) && table.keys().any(|name| name != "blocks") {
            return Err(Error::input("deep kernel attention has neither heads nor a bias")
                .try_this("leave out --heads, --key-width, --value-width, --bias and --reach"));
        }
        Ok(table)
    }

    fn config(&self, layers: Option<usize>) -> Result<Config> {
        model::settings(&self.table(layers)?)
    }
}

impl ModelArgs {
    fn network(&self, plan: &Plan) -> Result<network::Network> {
        let attention = self.sizes.attention();
        match &self.model {
            Some(name) => network::Network::trained(plan, name, attention),
            None => {
                let table = self.sizes.table(self.layers)?;
                network::Network::random(plan, &table, attention.unwrap_or(Attention::Scan))
            }
        }
    }
}

/// Lets every pool have `threads` threads: ours, and those that candle opens by itself.
fn set_threads(threads: Option<usize>) -> Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    let wanted = threads.to_string();
    environment::set(&[("RAYON_NUM_THREADS", &wanted), ("CANDLE_NUM_THREADS", &wanted)])?;
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| Error::input(format!("no {wanted} threads could be started: {e}")))
}

/// A number of something, at least 1: 10000, 10K, 1.5M.
fn count(text: &str) -> std::result::Result<usize, String> {
    let text = text.trim();
    let (digits, unit) = match text.chars().last() {
        Some('k' | 'K') => (&text[..text.len() - 1], 1e3),
        Some('m' | 'M') => (&text[..text.len() - 1], 1e6),
        _ => (text, 1.0),
    };
    let number = digits.parse::<f64>().map_or(f64::NAN, |n| n * unit);
    match number.fract() == 0.0 && (1.0..1e12).contains(&number) {
        true => Ok(number as usize),
        false => Err("write a whole number of at least 1, such as 10000, 10K or 1M".into()),
    }
}

/// The name that JSON gives a kind.
fn word(kind: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(kind).expect("a kind is plain data");
    value.as_str().map_or_else(|| value.to_string(), String::from)
}

/// One figure, its name in a column.
fn line(name: &str, text: impl std::fmt::Display) -> Result<()> {
    say(format!("{name:<20} {text}"))
}

/// The report for a reader.
fn table(report: &Report) -> Result<()> {
    let what = match report.model.as_deref() {
        None => format!("{} attention, one layer", word(&report.attention)),
        Some(name) => format!(
            "{} of {name} weights, {} attention, {} layers, {} parameters",
            report.command,
            word(&report.attention),
            report.layers,
            report.parameters.unwrap_or(0)
        ),
    };
    line("run", what)?;
    let tasks = if report.batch == 1 { String::new() } else { format!("{} × ", report.batch) };
    let asked = if report.targets == 0 { String::new() } else { format!(", {}", report.targets) };
    let asked = if asked.is_empty() { asked } else { format!("{asked} targets") };
    let layout = word(&report.layout);
    line("sites", format!("{tasks}{} contexts ({layout}){asked}", report.contexts))?;
    let terms: Vec<String> = report.bias.iter().map(word).collect();
    let bias = if terms.is_empty() { "none".to_string() } else { terms.join(", ") };
    let (heads, d, w) = (report.heads, report.key_width, report.value_width);
    line("heads", format!("{heads}, key width {d}, value width {w}, bias {bias}"))?;
    let mut precision = word(&report.precision);
    if let Some(way) = report.bf16 {
        precision += &format!(" ({way})");
    }
    let machine = format!("{} × {}", report.threads, report.cpu);
    if let Some(card) = &report.card {
        line("card", card)?;
    }
    line("machine", format!("{} {precision}, {machine}, {}", report.device, report.ceiling.simd))?;
    line("wall", format!("{} s, best of {}", round(report.wall_s), report.repeat))?;
    if let Some(seconds) = report.condition_s {
        line("of that, condition", format!("{} s", round(seconds)))?;
    }
    if let Some(seconds) = report.cpu_s {
        line("processor time", format!("{} s", round(seconds)))?;
    }
    line("head pairs", format!("{:e}", report.head_pairs as f64))?;
    line("a head pair", format!("{} ns", round(report.ns_per_head_pair)))?;
    let ceiling = &report.ceiling;
    line("its ceiling", format!("{} ns", round(report.ceiling_ns_per_head_pair)))?;
    line("share of the ceiling", format!("{} %", round(100.0 * report.ceiling_share)))?;
    let peak = round(ceiling.gflops);
    line("arithmetic", format!("{} GFLOP/s, peak {peak}", round(report.gflops)))?;
    let rates = |fma: f64, exp: f64| {
        format!("{} multiply-adds and {} exponentials a ns", round(fma), round(exp))
    };
    let together = rates(ceiling.fma_per_ns, ceiling.exp_per_ns);
    line("a thread of all", together)?;
    line("a thread alone", rates(ceiling.fma_per_ns_alone, ceiling.exp_per_ns_alone))?;
    if let Some(skipped) = report.skipped.filter(|s| *s > 0.0) {
        let lose = report.lose;
        let text = format!(
            "{} % of the head pairs, share that may be lost {lose}",
            round(100.0 * skipped)
        );
        line("left out", text)?;
    }
    if let Some(mib) = report.peak_card_mib {
        line("peak on the card", format!("{mib:.0} MiB"))?;
    }
    if let Some(mib) = report.peak_rss_mib {
        line("peak memory", format!("{mib:.0} MiB"))?;
    }
    if let Some(steps) = &report.step {
        let ways = [
            ("step, fused", &steps.fused),
            ("step, plain", &steps.plain),
            ("step, plain, whole", &steps.plain_whole),
        ];
        for (name, pace) in ways {
            let Some(pace) = pace else { continue };
            let cpu = pace.cpu_ms.map_or(String::new(), |ms| format!(", {} of cpu", round(ms)));
            let (best, median) = (round(pace.best_ms), round(pace.median_ms));
            let speed = round(pace.steps_per_s);
            let launches = pace.launches.map_or(String::new(), |n| format!(", {n} launches"));
            line(name, format!("{best} ms (median {median}{cpu}), {speed} steps/s{launches}"))?;
        }
        if let Some(ratio) = steps.ratio {
            line("plain over fused", format!("{ratio:.2}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn numbers_may_have_a_unit() {
        for (text, n) in [("1", 1), ("10000", 10_000), ("100K", 100_000), ("1.5M", 1_500_000)] {
            assert_eq!(count(text), Ok(n));
        }
        for text in ["0", "-3", "1.5", "", "K", "ten", "1G", "nan", "inf", "0.0001K"] {
            assert!(count(text).is_err(), "{text}");
        }
    }
}

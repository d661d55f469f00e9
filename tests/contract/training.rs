//! Laws of a training: who draws and how many changes nothing, and what cannot be had is refused.

use std::path::Path;

use candle_core::Device;
use isopleth::{
    Result,
    checkpoint::Checkpoint,
    likelihood::LIKELIHOODS,
    recipe::Recipe,
    train::{self, Options, calibration},
};

fn recipe(train: &str) -> Recipe {
    let text = format!(
        "model = {{ kind = \"cnp\", width = 8, depth = 2 }}\nprior = {{ kind = \"gp\" }}\n\
         design = {{ targets = 6, context = [{{ sites = [3, 12], weight = 1 }}] }}\n\
         [train]\nsteps = 6\nwarmup = 2\nrows = 4\nvalidate_tasks = 8\nvalidate_every = 3\n\
         checkpoint_every = 3\n{train}"
    );
    Recipe::parse(&text).unwrap()
}

fn options(out: &Path, drawing: usize) -> Options {
    Options {
        out: out.to_path_buf(),
        resume: false,
        steps: None,
        stop_at: None,
        seed: 3,
        devices: vec![Device::Cpu],
        drawing,
        machine: "a test".into(),
        start: None,
        until: None,
        threads: None,
    }
}

/// The bytes of the training state: weights, moments, averages.
fn state(out: &Path) -> Vec<u8> {
    let bytes = std::fs::read(out.with_extension("state.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].to_vec()
}

#[test]
fn the_number_of_drawers_changes_nothing() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let mut states = Vec::new();
    for drawing in [0, 1, 3, 8] {
        let out = folder.path().join(format!("{drawing}.safetensors"));
        train::run(&recipe(""), &options(&out, drawing), |_| {})?;
        states.push(state(&out));
    }
    assert!(states.iter().all(|s| *s == states[0]), "another number of drawers, other weights");
    Ok(())
}

#[test]
fn a_training_that_stops_and_goes_on_is_the_one_that_did_not() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    let [whole, twice] =
        ["whole", "twice"].map(|n| folder.path().join(n).with_extension("safetensors"));
    train::run(&recipe("optimiser = \"yogi\""), &options(&whole, 2), |_| {})?;
    let first = Options { stop_at: Some(2), ..options(&twice, 2) };
    train::run(&recipe("optimiser = \"yogi\""), &first, |_| {})?;
    let second = Options { resume: true, ..options(&twice, 3) };
    train::run(&recipe("optimiser = \"yogi\""), &second, |_| {})?;
    let ends = [whole, twice].map(|out| {
        // Validation at the stop may choose other best weights: compare what goes on.
        let bytes = std::fs::read(out.with_extension("state.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut kept: Vec<(String, Vec<u8>)> = tensors
            .tensors()
            .into_iter()
            .filter(|(name, _)| !name.starts_with("best:"))
            .map(|(name, view)| (name, view.data().to_vec()))
            .collect();
        kept.sort();
        kept
    });
    assert_eq!(ends[0], ends[1]);
    Ok(())
}

#[test]
fn reduced_precision_is_refused_on_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    for precision in ["tf32", "bf16"] {
        let recipe = recipe(&format!("precision = \"{precision}\""));
        let out = folder.path().join("m.safetensors");
        let error = train::run(&recipe, &options(&out, 1), |_| {}).unwrap_err();
        assert!(error.to_string().contains("for GPUs"), "{error}");
        assert!(error.help().unwrap().contains("--device cuda"));
        assert!(!out.exists());
    }
    let fixed = recipe("precision = \"f32\"\ndeterministic = true");
    let out = folder.path().join("f.safetensors");
    train::run(&fixed, &options(&out, 1), |_| {}).unwrap();
}

/// Every likelihood without a shipped model can be learned: after a short training of a small network on smooth surfaces, its
/// law of a new village beats that of the rule that knows no map.
#[test]
fn every_likelihood_is_learned() -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    // The first two are those of the shipped models.
    for likelihood in &LIKELIHOODS[2..] {
        let name = likelihood.name();
        let recipe = Recipe::parse(&format!(
            "[model]\nkind = \"cnp\"\nwidth = 32\ndepth = 2\nhead = {{ components = 2 }}\n\
             [prior]\nkind = \"gp\"\nkernels = {{ squared-exponential = 1 }}\n\
             length_scale = 1.5\nsill_sd = 1.5\nnugget_sd = 0.2\nnugget_absent = 0.0\n\
             mean = {{ normal = [-1.0, 0.5] }}\nsum = 0.0\nproduct = 0.0\nanisotropic = 0.0\n\
             [trials]\nbase = {{ log-uniform = [20.0, 100.0] }}\nsize = 8.0\nprecision = 20.0\n\
             [design]\ntargets = 24\ncontext = [{{ sites = [24, 40], weight = 1 }}]\n\
             [task]\nlikelihood = \"{name}\"\n\
             [train]\nsteps = 400\nrate = 4e-3\nwarmup = 20\nrows = 32\nvalidate_tasks = 8\n\
             validate_every = 400\ncheckpoint_every = 400"
        ))?;
        let out = folder.path().join(format!("{name}.safetensors"));
        train::run(&recipe, &options(&out, 1), |_| {})?;
        let asked = calibration::Options { tasks: 60, most_sites: 40, seed: 9 };
        let report = calibration::measure(&Checkpoint::open(&out)?, &asked, |_| {})?;
        let rule = report.rivals.iter().find(|r| r.name == "intercept-only").unwrap();
        let (model, rule) = (rule.model.observation.log_density, rule.its.observation.log_density);
        println!("{name}: {model:.3} nats a village, {rule:.3} by the rule");
        assert!(model > rule + 0.02, "{name}: {model} nats a village, {rule} by the rule");
    }
    Ok(())
}

#[cfg(feature = "cuda")]
mod on_a_gpu {
    use super::*;

    /// The GPU, if there is one; a must where `ISOPLETH_GPU` is set.
    fn gpu() -> Option<Device> {
        match isopleth::device::open("cuda") {
            Ok(device) => Some(device),
            Err(e) if std::env::var_os("ISOPLETH_GPU").is_some() => panic!("{e}: {:?}", e.facts()),
            Err(_) => {
                eprintln!("skipped: there is no GPU here");
                None
            }
        }
    }

    /// One that uses every kernel of a step: attention with a bias, normalisation, GELU.
    fn attentive(train: &str) -> Recipe {
        let tnp = "kind = \"tnp-kr\", width = 16, blocks = 2, heads = 2, key_width = 8, \
             value_width = 8, embed = [16], feed_forward = 16, head_widths = [16]";
        let text = recipe(train).text().replace("kind = \"cnp\", width = 8, depth = 2", tnp);
        assert!(text.contains("tnp-kr"));
        Recipe::parse(&text).unwrap()
    }

    /// Losses and norms of the last gradient, as they were reported, and the state.
    fn trained(recipe: &Recipe, device: &Device) -> (Vec<[f64; 2]>, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("m.safetensors");
        let options = Options { devices: vec![device.clone()], ..options(&out, 1) };
        let mut told = Vec::new();
        train::run(recipe, &options, |p| told.push([p.loss, p.norm])).unwrap();
        (told, state(&out))
    }

    #[test]
    fn a_training_goes_as_on_the_cpu_and_the_same_way_twice() {
        let Some(device) = gpu() else { return };
        for train in ["", "optimiser = \"yogi\"\nloss = \"surface\""] {
            for recipe in [recipe(train), attentive(train)] {
                let (here, _) = trained(&recipe, &Device::Cpu);
                let (there, state) = trained(&recipe, &device);
                assert_eq!(here.len(), there.len());
                for (a, b) in here.iter().flatten().zip(there.iter().flatten()) {
                    assert!((a - b).abs() < 1e-3 * a.abs().max(1.0), "{here:?} and {there:?}");
                }
                assert_eq!(trained(&recipe, &device).1, state, "another run, other weights");
            }
        }
    }

    /// Few steps hardly tell: that each goes its own way and ends near the others.
    #[test]
    fn rounded_products_train_too() {
        let Some(device) = gpu() else { return };
        let exact = trained(&attentive(""), &device).0;
        for precision in ["tf32", "bf16"] {
            let found = trained(&attentive(&format!("precision = \"{precision}\"")), &device).0;
            for (a, b) in exact.iter().zip(&found) {
                assert!((a[0] - b[0]).abs() < 0.1 * a[0].abs().max(1.0), "{exact:?} and {found:?}");
            }
        }
    }
}

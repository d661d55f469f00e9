//! Every model of the family, from a recipe to a map.

use std::fs;

use isopleth::model::MODELS;
use tempfile::TempDir;

use super::{
    ok,
    recipes::{train, write},
};

#[test]
fn every_model_is_trained_and_maps() {
    let folder = TempDir::new().unwrap();
    for entry in MODELS {
        let recipe = format!(
            "name = 'tiny {kind}'\n[model]\nkind = '{kind}'\n{tiny}\n[prior]\nkind = 'gp'\n\
             [design]\ncontext = [{{ sites = [10, 20], weight = 1.0 }}]\ntargets = 8\n\
             [task]\nlikelihood = 'binomial'\n[train]\nsteps = 2\nrows = 2\nvalidate_tasks = 2\n",
            kind = entry.name,
            tiny = entry.tiny
        );
        let recipe = write(&folder, &format!("{}.toml", entry.name), &recipe);
        let model = folder.path().join(format!("{}.safetensors", entry.name));
        train(&recipe, &model, &[]);
        let (model, out) = (model.to_str().unwrap(), folder.path().join(entry.name));
        let survey = ["map", "--surveys", "data/survey.csv", "--resolution", "60km"];
        ok(&[&survey[..], &["--model", model, "--out", out.to_str().unwrap()]].concat());
        let record = fs::read_to_string(out.join("run.json")).unwrap();
        assert!(record.contains(&format!("tiny {}", entry.name)), "{}: {record}", entry.name);
        assert!(fs::metadata(out.join("mean.tif")).unwrap().len() > 500, "{}", entry.name);
    }
}

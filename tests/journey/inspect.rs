//! Reading a model's card.

use isopleth::checkpoint::Checkpoint;
use tempfile::TempDir;

use super::{
    assert_error, ok,
    recipes::{TINY, train, write},
    refused,
};

#[test]
fn a_model_tells_what_it_is_and_what_it_learned_from() {
    let folder = TempDir::new().unwrap();
    let recipe = write(&folder, "tiny.toml", TINY);
    let model = folder.path().join("tiny.safetensors");
    train(&recipe, &model, &["--steps", "2", "--seed", "7"]);
    let path = model.to_str().unwrap();
    let said = ok(&["inspect", path]);
    assert!(said.starts_with("tiny: logit prevalence\n"), "{said}");
    for part in [
        "cnp",
        "positive of tested",
        "2; the weights are those of step 2",
        "nats per target",
        "told the true kernel",
        "0.1 to 1, log-uniform",
        "3 to 12 in 100 % of them",
        // A default, which the recipe does not write.
        "chance of no nugget",
    ] {
        assert!(said.contains(part), "no `{part}` in\n{said}");
    }
    let seed = said.lines().find(|l| l.trim().starts_with("seed")).unwrap();
    assert!(seed.ends_with(" 7"), "{seed}");

    let json: serde_json::Value = serde_json::from_str(&ok(&["inspect", path, "--json"])).unwrap();
    let card = Checkpoint::open(&model).unwrap().card;
    assert_eq!(json, serde_json::to_value(&card).unwrap());
    assert_eq!((json["steps"].as_u64(), json["recipe"].as_str()), (Some(2), Some(TINY)));
}

#[test]
fn every_shipped_model_has_a_card() {
    for (name, _) in isopleth::checkpoint::shipped() {
        assert!(ok(&["inspect", name]).starts_with(&format!("{name}: ")));
    }
}

#[test]
fn what_has_no_card_is_refused() {
    let folder = TempDir::new().unwrap();
    let text = write(&folder, "survey.csv", "lon,lat,tested,positive\n1,2,3,1\n");
    assert_error(&refused(&["inspect", &text]), "not a model", &["survey.csv"], "train");
    assert_error(&refused(&["inspect", "no/such.safetensors"]), "could not read", &[], "path");
    assert_error(&refused(&["inspect", "zzz"]), "no model named `zzz`", &[], "list models");
    assert_error(&refused(&["inspect", "gp"]), "`gp` has no card", &[], "--model gp");
    assert_error(&refused(&["inspect", "vecchia"]), "no card", &[], "--model vecchia");
}

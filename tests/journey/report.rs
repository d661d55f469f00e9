//! `isopleth map --report`: one page that holds everything and asks for nothing.

use std::{fs, path::Path, process::Command};

fn isopleth(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_isopleth")).args(args).output().unwrap()
}

/// The bundled survey under a name that is markup.
fn survey(folder: &Path) -> String {
    let file = folder.join("a<b>&c.csv");
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("data/survey.csv"), &file).unwrap();
    file.to_str().unwrap().to_string()
}

#[test]
fn the_report_holds_everything_and_asks_for_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (survey, out) = (survey(folder.path()), folder.path().join("out"));
    let table = folder.path().join("districts.csv");
    fs::write(&table, "name,mean,low,high\n<North>,0.2134567,0.1,\nSouth,0.3,0.2,0.4\n").unwrap();
    let [out_, table] = [&out, &table].map(|p| p.to_str().unwrap());
    let run = isopleth(&[
        "map",
        "--surveys",
        &survey,
        "--resolution",
        "20km",
        "--threshold",
        "0.2",
        "--report",
        "--districts",
        table,
        "--out",
        out_,
    ]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    // Nothing from elsewhere: every picture is inside, nothing is loaded or run.
    assert_eq!(page.matches("<img ").count(), page.matches("src=\"data:image/png;base64,").count());
    assert!(page.matches("<img ").count() >= 8, "six maps, calibration, variogram");
    for asks in ["<script", "<link", "src=\"http", "url(", "@import", "<iframe"] {
        assert!(!page.contains(asks), "{asks}");
    }
    // What a user wrote is shown, not obeyed.
    assert!(page.contains("a&lt;b&gt;&amp;c.csv") && !page.contains("a<b>"), "the survey's name");
    assert!(
        page.contains("<td>&lt;North&gt;</td><td>0.213</td><td>0.1</td><td>–</td>"),
        "districts"
    );
    for part in
        ["Maps", "Can the intervals be believed?", "Districts", "Data", "Methods", "Run record"]
    {
        assert!(page.contains(&format!("<h2>{part}</h2>")), "{part}");
    }
    for said in [
        "intercept-only",
        "mapped from 138 sites",
        "nobody tested",
        "arXiv:2411.12502",
        "&quot;exceedance:0.2&quot;",
    ] {
        assert!(page.contains(said), "{said}");
    }
    // It belongs to the run: the next one replaces it, and scratch pictures are gone.
    let left: Vec<String> = fs::read_dir(&out)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("report"))
        .collect();
    assert_eq!(left, ["report.html"]);
    let run = isopleth(&[
        "map",
        "--surveys",
        &survey,
        "--resolution",
        "40km",
        "--force",
        "--no-pictures",
        "--out",
        out_,
    ]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert!(!out.join("report.html").exists(), "a report of another run is worse than none");
}

#[test]
fn a_browser_shows_it() {
    let browser = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(|name| {
        Command::new(name).arg("--version").output().is_ok_and(|run| run.status.success())
    });
    let Some(browser) = browser else {
        eprintln!("skipped: no Chromium on this machine");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (survey, out) = (survey(folder.path()), folder.path().join("out"));
    let run = isopleth(&[
        "map",
        "--surveys",
        &survey,
        "--resolution",
        "40km",
        "--report",
        "--out",
        out.to_str().unwrap(),
    ]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let url = format!("file://{}", out.join("report.html").display());
    let dom = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=2000",
            "--dump-dom",
            &url,
        ])
        .output()
        .unwrap();
    let dom = String::from_utf8_lossy(&dom.stdout).into_owned();
    assert!(
        dom.contains("Can the intervals be believed?") && dom.contains("</html>"),
        "{} bytes",
        dom.len()
    );
    let shot = folder.path().join("page.png");
    let run = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2400"])
        .arg(format!("--screenshot={}", shot.display()))
        .arg(&url)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    // A page without its pictures is a few ten thousand bytes.
    assert!(fs::metadata(&shot).unwrap().len() > 150_000, "{:?}", fs::metadata(&shot));
}

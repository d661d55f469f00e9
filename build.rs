//! With the feature `cuda`: compiles every kernel file to a fat binary with nvcc. Without it: nothing.
//!
//! A fat binary holds machine code for the cards that are named here, which starts at once, and PTX, which
//! drivers compile for any later card. The driver itself picks (src/device/kernels.rs).

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// Where kernels are.
const KERNELS: [&str; 2] = ["src/attention/cuda", "src/fused/cuda"];
/// Cards that get machine code of their own: Ampere (A100), Ada (L40S, RTX 40), Hopper (H100, H200).
const CARDS: [u32; 3] = [80, 89, 90];
/// Compilers at work at a time.
const COMPILERS: usize = 2;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        kernels();
    }
}

fn kernels() {
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let mut files = Vec::new();
    for folder in KERNELS.into_iter().filter(|folder| Path::new(folder).is_dir()) {
        println!("cargo::rerun-if-changed={folder}");
        let entries = fs::read_dir(folder).expect("a folder of the sources");
        files.extend(entries.map(|entry| entry.expect("a file of the sources").path()));
    }
    files.retain(|path| path.extension().is_some_and(|e| e == "cu"));
    // The largest first, so that none is left alone at the end.
    files.sort_by_key(|path| std::cmp::Reverse(fs::metadata(path).map_or(0, |m| m.len())));
    // The least card to serve. nvcc's architecture-bound names (90a) count as their number.
    let least = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80".into());
    let least: u32 = least.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(80);
    let nvcc = nvcc();
    let mut at_work: Vec<(PathBuf, Child)> = Vec::new();
    for file in files {
        if at_work.len() == COMPILERS {
            finish(&nvcc, at_work.remove(0));
        }
        match compiler(&nvcc, &file, least).spawn() {
            Ok(child) => at_work.push((file, child)),
            Err(e) => {
                println!(
                    "cargo::error=the feature `cuda` needs nvcc, and {} cannot be run ({e}): use \
                     scripts/build-cuda.sh, or set CUDA_HOME to a CUDA toolkit",
                    nvcc.display()
                );
                break;
            }
        }
    }
    at_work.into_iter().for_each(|work| finish(&nvcc, work));
}

/// nvcc on its way from `NAME.cu` to `NAME.fatbin` in the output folder.
fn compiler(nvcc: &Path, file: &Path, least: u32) -> Command {
    let name = file.file_stem().expect("a kernel file has a name");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"))
        .join(name)
        .with_extension("fatbin");
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-O3", "-std=c++17"]);
    for card in CARDS.into_iter().filter(|card| *card >= least) {
        command.arg(format!("-gencode=arch=compute_{card},code=sm_{card}"));
    }
    command.arg(format!("-gencode=arch=compute_{least},code=compute_{least}"));
    command.arg("-o").arg(out).arg(file).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn finish(nvcc: &Path, (file, child): (PathBuf, Child)) {
    let ran = child.wait_with_output().expect("a compiler that was started");
    if !ran.status.success() {
        let said = String::from_utf8_lossy(&ran.stderr).replace('\n', " / ");
        println!("cargo::error={} cannot compile {}: {said}", nvcc.display(), file.display());
    }
}

/// `NVCC`, or that of the toolkit in `CUDA_HOME` or `CUDA_PATH`, or the one on the path.
fn nvcc() -> PathBuf {
    let of = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = of("CUDA_HOME").or_else(|| of("CUDA_PATH"));
    of("NVCC").or(home.map(|home| home.join("bin/nvcc"))).unwrap_or_else(|| "nvcc".into())
}

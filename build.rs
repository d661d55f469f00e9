//! With the feature `cuda`: compiles the kernels to PTX with nvcc. Without it: nothing.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// Where the kernels are.
const KERNELS: &str = "src/attention/cuda";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        kernels();
    }
}

fn kernels() {
    println!("cargo::rerun-if-changed={KERNELS}");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    // PTX of the least card to serve: drivers compile it for any later one.
    let least = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80".into());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("scan.ptx");
    let nvcc = nvcc();
    let ran = Command::new(&nvcc)
        .args(["-ptx", "-O3", "-std=c++17", "-arch", &format!("compute_{least}"), "-o"])
        .arg(&out)
        .arg(Path::new(KERNELS).join("scan.cu"))
        .output();
    match ran {
        Ok(ran) if ran.status.success() => {}
        Ok(ran) => {
            let said = String::from_utf8_lossy(&ran.stderr).replace('\n', " / ");
            println!("cargo::error={} cannot compile {KERNELS}/scan.cu: {said}", nvcc.display());
        }
        Err(e) => println!(
            "cargo::error=the feature `cuda` needs nvcc, and {} cannot be run ({e}): use \
             scripts/build-cuda.sh, or set CUDA_HOME to a CUDA toolkit",
            nvcc.display()
        ),
    }
}

/// `NVCC`, or that of the toolkit in `CUDA_HOME` or `CUDA_PATH`, or the one on the path.
fn nvcc() -> PathBuf {
    let of = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = of("CUDA_HOME").or_else(|| of("CUDA_PATH"));
    of("NVCC").or(home.map(|home| home.join("bin/nvcc"))).unwrap_or_else(|| "nvcc".into())
}

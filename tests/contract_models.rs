//! Laws of models and of what they are made of: fused layers, attention, and everything registered.

#[path = "contract/attention.rs"]
mod attention;
#[path = "contract/convcnp.rs"]
mod convcnp;
#[path = "contract/cuda.rs"]
mod cuda;
#[path = "contract/cuda_tensor.rs"]
mod cuda_tensor;
#[path = "contract/fused.rs"]
mod fused;
#[path = "contract/latent.rs"]
mod latent;
#[path = "contract/models.rs"]
mod models;
#[path = "contract/reader.rs"]
mod reader;
#[path = "contract/time_bias.rs"]
mod time_bias;

/// The same loops are compiled for several instruction sets. A machine with the best of them would
/// never run the others, so the laws that hold them to their f64 twins are run again in a child.
#[test]
fn every_instruction_set_gives_the_same() {
    let this = std::env::current_exe().unwrap();
    for level in ["portable", "avx2"] {
        for laws in ["attention::", "fused::", "reader::"] {
            let child = std::process::Command::new(&this)
                .arg(laws)
                .env("ISOPLETH_SIMD", level)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&child.stdout);
            assert!(child.status.success(), "{level}: {said}");
            assert!(!said.contains(" 0 passed"), "{level}: `{laws}` names no law\n{said}");
        }
    }
}

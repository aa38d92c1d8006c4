#!/bin/sh
# Joins the pieces of one or more sets made by pack.py, checks them and unpacks them into TARGET.
#
#   sh unpack.sh TARGET FOLDER [FOLDER ...]     FOLDER: where the pieces and SHA256SUMS of a set are
#
# Then:  . TARGET/env-tensorrt85.sh    and    $PYTHON $LP_EDGE/benchmarks/gpu/run.py --out DIR ...
# Needs sh, sha256sum, tar, and xz or a python3 with lzma. Nothing is downloaded.
set -eu
if [ $# -lt 2 ]; then
    echo "unpack: got $# arguments; expected TARGET and one or more folders of pieces" >&2
    exit 2
fi
target=$1
shift
mkdir -p "$target"
target=$(cd "$target" && pwd)
unxz() {
    if command -v xz >/dev/null; then xz -dc; else python3 -c 'import lzma, shutil, sys
shutil.copyfileobj(lzma.open(sys.stdin.buffer), sys.stdout.buffer, 1 << 20)'; fi
}
for folder in "$@"; do
    if ! (cd "$folder" && sha256sum --check --quiet SHA256SUMS); then
        echo "unpack: $folder is damaged or not whole; expected every piece that SHA256SUMS names; copy it again" >&2
        exit 5
    fi
    # In the order of their names, which is that of the numbers.
    (cd "$folder" && cut -c67- SHA256SUMS | tr '\n' '\0' | xargs -0 cat) | unxz | tar -x -C "$target"
    echo "unpack: $folder is in $target"
done
# One file of settings for each way to run; a "." with an argument is not the same in every shell.
cat >"$target/env.sh" <<END
# the project as \$LP_EDGE, with this machine's own interpreter as \$PYTHON
export LP_EDGE=$target/project/lp_edge PYTHON=python3 PYTHONPATH=$target/project
END
cat >"$target/env-tensorrt85.sh" <<END
. $target/env.sh
PYTHON=$target/tensorrt85/python/bin/python3.10
PYTHONPATH=$target/project:$target/tensorrt85/site
# last: real libraries of these names come first where there are any
export LD_LIBRARY_PATH="\${LD_LIBRARY_PATH:+\$LD_LIBRARY_PATH:}$target/tensorrt85/site/tensorrt:$target/tensorrt85/stand_ins"
END
cat >"$target/env-onnxruntime-gpu.sh" <<END
. $target/env.sh
PYTHONPATH=$target/project:$target/onnxruntime-gpu/site
END
echo "unpack: . $target/env.sh, env-tensorrt85.sh or env-onnxruntime-gpu.sh"

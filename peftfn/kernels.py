"""Fused operations, one a file: each has a plain-torch form that runs anywhere, and is what it means.

`use("torch" | "triton" | "auto")` forces a form, or leaves the choice to the rules in `choose.py`.

The files are in the folder `kernels` beside this one once installed, and at the root of a clone. There the folder is no
package, for a package of that name is another's, which transformers and PEFT look for.
"""

from pathlib import Path

_here = Path(__file__).parent
__path__ = [str(p) for p in (_here / "kernels", _here.parent / "kernels") if (p / "choose.py").exists()][:1]

import peftfn.kernels.choose as choose  # noqa: E402  (found by the path above)

use = choose.use
__all__ = ["choose", "use"]

"""Check the arguments of eval.py and inference.py, before any work is done."""

from pathlib import Path

from reid import ReidError
from reid.cli import check_ranges
from reid.data.names import check_person
from reid.files import REPORT, RESULTS, check_outputs
from reid.retrieval.protocol import SPLITS
from reid.retrieval.stored import FORMAT, check_replaceable, default_uri, is_milvus

DATA_ROOT = "data/market-1501-grouped"
CHANGES = ("add", "rename", "remove", "older_than", "list")  # options of inference.py that change or list the gallery


def check_evaluation(args):
    """Raise ReidError for arguments that cannot work, before any work is done; one protocol for each dataset."""
    check_ranges(args, {"far": (1e-9, 1), "batch_size": (1, 1 << 16), "single_shot": (1, 1000)})
    _check_common(args)
    if args.network:
        args.exp_name = [args.exp_name]
    if len(args.protocol) == 1:
        args.protocol *= len(args.data_root)
    if len(args.protocol) != len(args.data_root):
        raise ReidError(f"{len(args.data_root)} --data_root but {len(args.protocol)} --protocol: give one for all or for each")
    roots, evaluations = len(args.data_root), len(args.data_root) * len(args.exp_name)
    if (roots > 1 and (args.load_index or args.save_index or args.spacetime)) or (
            evaluations > 1 and (args.gallery_uri or args.report)):
        raise ReidError("several --data_root have no one index and no common clocks for --spacetime, several evaluations no one "
                        "--gallery_uri or --report: evaluate them one by one")
    if set(args.protocol) & set(SPLITS) and (args.report or args.compare or args.single_shot):
        raise ReidError("--report, --compare and --single_shot are of one gallery, but --protocol viper and prid draw ten: use "
                        "--protocol market")
    extra = ("json", "load_index", "save_index", "gallery_uri", "multi_query", "rerank", "spacetime", "network")
    if args.compare and (unused := [f"--{name}" for name in extra if getattr(args, name)]):
        raise ReidError(f"--compare prints two runs from their saved indexes; leave out {', '.join(unused)}")
    if args.multi_query and args.spacetime:
        raise ReidError("--spacetime needs the time of each query, which --multi_query averages over: give one of them")
    if args.multi_query and "nocam" in args.protocol:
        raise ReidError("--multi_query averages the images of one camera, which --protocol nocam ignores: give one of them")
    uris = [uri for exp_name in args.exp_name if not is_milvus(uri := args.gallery_uri or default_uri(exp_name))]
    saved, loaded = (uris, []) if args.save_index else ([], uris)
    folders = [Path(root, split) for root in args.data_root for split in ("gallery", "query", "train")]
    check_outputs([("json", args.json, RESULTS), ("report", args.report, REPORT),
                   *(("gallery_uri", uri, FORMAT) for uri in saved)], [*folders, *loaded], args.overwrite)
    for uri in saved:
        check_replaceable(uri, args.data_root[0], queries=True, overwrite=args.overwrite)


def check_search(args):
    """Raise ReidError for arguments that cannot work, before any work is done; give --gallery_uri its default."""
    check_ranges(args, {"topk": (1, 1 << 40), "positions": (1, 1 << 40), "cameras": (-1, 1 << 40), "batch_size": (1, 1 << 16),
                        "frames": (-1, 1 << 62), "older_than": (1e-6, 1e6), "threshold": (-1, 1), "port": (0, 65535)})
    for option, value in vars(args).items():
        if any(isinstance(text, str) and not text.strip() for text in (value if isinstance(value, list) else [value])):
            raise ReidError(f"--{option}: has an empty value; is a shell variable unset? Give a value, or leave the option out")
    _check_common(args)
    if args.network and args.export:
        raise ReidError("--export: writes the network of a run; leave out --network")
    for option, other in (("positions", "output"), ("onnx_input", "export"), ("name", "add"), ("threshold", "group"),
                          ("writable", "serve"), ("writable", "load_index")):
        if getattr(args, option) is not None and not getattr(args, other):
            raise ReidError(f"--{option} needs --{other}")
    replaced = ("query_paths", "serve", "export", "output", "json", "rerank", "spacetime", *CHANGES)
    for option in ("group", *CHANGES):
        given = [f"--{other}" for other in replaced if other != option and getattr(args, option) and getattr(args, other)]
        if given:
            raise ReidError(f"--{option} and {given[0]}: give one of them")
    if args.name:
        args.name = check_person(args.name, "--name")
    if args.rename:
        args.rename[1] = check_person(args.rename[1], "--rename")
    if args.positions and min(args.positions) > args.topk:
        raise ReidError(f"--positions {min(args.positions)}: beyond --topk {args.topk}, so nothing would be drawn")
    if (args.serve or args.export) and not (args.output is args.json is None):
        raise ReidError("--output and --json are of ranked lists, which --serve and --export do not make: leave them out")
    if args.frames and args.frames[0] > args.frames[1]:
        raise ReidError(f"--frames {args.frames[0]} {args.frames[1]}: give the first frame, then the last one")
    uri = args.gallery_uri = args.gallery_uri or default_uri(args.exp_name, args.gallery)
    if args.gallery and not (args.data_root or args.query_paths or args.save_index or args.serve or args.group):
        raise ReidError("--gallery: give --query_paths, the images to look for, or --save_index, to keep the gallery only")
    if args.gallery and args.spacetime and not args.data_root:
        raise ReidError("--spacetime: learned on a dataset by eval.py; give its --data_root beside --gallery")
    if args.index_type != "FLAT" and not (args.save_index and is_milvus(uri)):
        raise ReidError(f"--index_type {args.index_type} needs a gallery in Milvus: give --save_index and --gallery_uri")
    if args.save_index and not is_milvus(uri):
        check_replaceable(uri, args.gallery or args.data_root or DATA_ROOT, queries=False, overwrite=args.overwrite)


def _check_common(args):
    """Check what both scripts have. The name of the file of --network takes the place of the run's in `args.exp_name`."""
    if args.network and not args.network_input:
        raise ReidError("--network needs --network_input, the pixels that the network expects")
    if args.network_input and not args.network:
        raise ReidError("--network_input needs --network, the file")
    if args.network:
        if args.engine == "torch":
            raise ReidError("--engine torch: --network is computed by OpenVINO; leave --engine out")
        args.exp_name = Path(args.network).stem
    if args.load_index and args.save_index:
        raise ReidError("--load_index and --save_index: give one of them; --save_index alone embeds only what has changed")

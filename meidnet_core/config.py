"""One dataclass holds everything that defines a run; it is stored with every checkpoint and result."""

from dataclasses import asdict, dataclass, fields, replace

SPLIT_SCHEMES = ("cdvae", "grouped")


@dataclass(frozen=True)
class Config:
    """All settings of a model and its training. Presets: see PRESETS."""

    name: str = "paper"
    dataset: str = "perov_5"
    split_scheme: str = "cdvae"            # cdvae | grouped (no composition, nor its A/B twin, in two splits)
    labels: tuple = ("dir_gap", "heat_all")    # one label: bi-modal, two: tri-modal
    fusion: str = "early"                  # early | late (S1.1, S1.2)
    # model
    latent: int = 128
    width: int = 128                       # node features
    edge_width: int = 128                  # messages
    blocks: int = 3                        # EGNN blocks in the encoder, and as many in the decoder
    rbf: int = 0                           # Gaussians on the minimum-image distance as edge attributes a_ij; 0: none
    cutoff: float = 4.0                    # angstrom, adjacency A_ij
    all_pairs: bool = False                # encoder messages between all pairs, adjacency only as an attribute
    residual: bool = False                 # h' = h + phi_h(h, m) with LayerNorm, instead of eq. (x) as written
    pool_heads: int = 0                    # weighted means over sites instead of one mean (eq. iv); 0: the mean
    site_init: bool = False                # decoder: one linear map per site from z, instead of z + site query
    dropout: float = 0.0
    descriptors: bool = False              # elements enter and leave through ions.descriptors plus a residual of their own
    partial: bool = False                  # the property encoder takes any subset of the labels and is told which are known
    label_drop: float = 0.0                # fraction of labels hidden from the property encoder while training (partial)
    # targets and losses
    normalize: bool = False                # standardise lattice and labels with training statistics
    unit_lattice: bool = False             # lattice in units of 20 angstrom and 180 degrees, as the authors' code has it
    w_lattice: float = 1.0
    w_adjacency: float = 1.0
    w_species: float = 1.0
    w_coords: float = 1.0
    w_prop: float = 1.0
    w_prop_structure: float = 0.0          # the same property loss from the structural embedding alone
    w_con: float = 1.0                     # lambda of S1
    w_align: float = 0.0                   # 1 - cosine of paired embeddings, scheduled like the contrastive term
    prop_head: bool = False                # structure-alone labels from z_c by a head of their own, not from y_c
    prop_l1: bool = False                  # squared plus absolute error of the labels from the structure alone
    exchange: float = 0.0                  # the property decoder returns labels that were embedded with this much noise
    temperature: float = 0.07              # tau of InfoNCE
    gumbel_tau: float = 1.0
    gumbel_noise: bool = True              # cross-entropy on a Gumbel-softmax sample (training only)
    structure_only: float = 0.0            # fraction of samples decoded from the structural embedding alone
    latent_noise: float = 0.0              # length of Gaussian noise on the joint latent while training
    label_noise: float = 0.0               # noise on the labels that are embedded, in units of their spread (training)
    curriculum: str = "exp"                # exp (eq. vi) | linear (S1.1) | none
    ramp: float = 2 / 3                    # fraction of the epochs in which the weight rises to 1
    # optimisation
    optimizer: str = "adam"                # adam | adamw
    schedule: str = "constant"             # constant | onecycle
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 0.0                      # gradient norm; 0: off
    ema: float = 0.0                       # decay per step of the averaged weights that are evaluated; 0: off
    batch: int = 16
    epochs: int = 2000
    seed: int = 0

    def __post_init__(self):
        allowed = {"fusion": ("early", "late"), "curriculum": ("exp", "linear", "none"),
                   "optimizer": ("adam", "adamw"), "schedule": ("constant", "onecycle"),
                   "split_scheme": SPLIT_SCHEMES}
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise ValueError(f"Config.{key} = {getattr(self, key)!r}: expected one of {', '.join(values)}")
        object.__setattr__(self, "labels", tuple(self.labels))     # JSON gives a list

    def with_(self, **changes):
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_dict(self):
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values):
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown configuration keys: {', '.join(sorted(unknown))}")
        return cls(**values)


def renamed(cfg, epochs):
    """cfg (any with `epochs`, `name` and `with_`) with so many epochs; another number goes by a name of its own, so that the results and
    the model of this one are not overwritten."""
    return cfg if epochs == cfg.epochs else cfg.with_(epochs=epochs, name=f"{cfg.name}{epochs}")


# As the text states: three EGNN blocks, 128-d latent, raw targets, Adam 1e-3, batch 16, early fusion with
# curriculum. The text leaves hidden widths, temperature and loss weights open: 128, 0.07 (CLIP), all 1.
PAPER = Config()

# The other reading of "species logits (via Gumbel-Softmax)" (S2.4.1): their cross-entropy as it is, samples for the discrete output alone.
PAPER_CLEAN = PAPER.with_(name="paper-clean", gumbel_noise=False)

# The paper's model with its scales put right: the changes that together, none of them alone, make it learn (chapter 5).
PAPER_SCALED = PAPER_CLEAN.with_(name="paper-scaled", normalize=True, residual=True, temperature=1.0, w_coords=30.0, clip=1.0)

IMPROVED = Config(
    name="improved", width=96, edge_width=48, rbf=32, all_pairs=True, residual=True, pool_heads=6, site_init=True,
    normalize=True, w_coords=30.0, w_lattice=1.0, w_adjacency=0.3, w_prop=1.0, w_prop_structure=3.0, w_con=1.0,
    temperature=1.0, gumbel_noise=False, dropout=0.05, latent_noise=0.04, label_noise=0.03,
    optimizer="adamw", schedule="onecycle", lr=3e-3, weight_decay=0.01, clip=1.0, ema=0.99, batch=128, epochs=70,
)

# `improved` with the property branch of its own: labels from the structure by a head on z_c, a decoder that returns the
# labels it was given, and an explicit pull between paired embeddings. The model that is published (lab notes: why).
PRODUCTION = IMPROVED.with_(name="production", prop_head=True, prop_l1=True, exchange=0.5, w_align=3.0, w_species=2.0, epochs=64)

# The same decoded from the structural embedding alone: an autoencoder of crystals as FTCP and CDVAE are, for Table 1.
STRUCTURE = PRODUCTION.with_(name="structure", structure_only=1.0)

# Perov-5 and OQMD together (oqmd.py): labels of three theories, each with a column of its own, any subset of them known.
EXTENDED = PRODUCTION.with_(
    name="extended", dataset="extended", labels=("dir_gap", "heat_all", "pbe_gap", "delta_e", "stability"), descriptors=True,
    partial=True, label_drop=0.3, epochs=40)

# The same with the cells that this project relaxed (own_cells.py) and a column for what the potential says of them.
EXTENDED_OWN = EXTENDED.with_(dataset="extended_own", labels=(*EXTENDED.labels, "own_stability"))

PRESETS = {cfg.name: cfg for cfg in (PAPER, PAPER_CLEAN, PAPER_SCALED, IMPROVED, PRODUCTION, STRUCTURE)}
PRESETS |= {"extended": EXTENDED, "extended-own": EXTENDED_OWN}

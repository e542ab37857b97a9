from test_tgpo import *
def test_x(problems, make_teacher):
    teacher, args = make_teacher("tgpo-adv-matched")
    ro = rollout_of(tgpo, problems)
    adv = teacher.read(ro, list(range(12)))
    print(adv.labels.tolist(), ro.completions.tolist(), adv.agrees[ro.mask].sum())
    gs = {}
    for g in tgpo.METHODS:
        s,_ = run_update(problems, *make_teacher(g)); gs[g]=s[0][1]
    print({g: error(v, gs["none"]) for g,v in gs.items()})

"""Manifest and settings are checked, and every header is read, before any work starts."""


rule plan:
    input:
        config["manifest"],
    output:
        PLAN,
    log:
        f"{LOGS}/plan.log",
    resources:
        mem_mb=8000,
        runtime=120,
    params:
        out=out_folder,
        options=shlex.join(stage_options(with_encoders=True)),
        missing="--allow-missing" if config["allow_missing"] else "",
    shell:
        "pathopipe cohort plan {input:q} --out {params.out:q} {params.options} {params.missing} > {log:q} 2>&1"

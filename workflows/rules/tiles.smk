"""The tile grid over the tissue of a slide."""


rule tiles:
    input:
        before=f"{DONE}/tissue/{{slide_id}}.json",
        plan=ancient(PLAN),
    output:
        f"{DONE}/tiles/{{slide_id}}.json",
    log:
        f"{LOGS}/tiles/{{slide_id}}.log",
    retries: config["retries"]
    group:
        "slide"
    threads: config["threads"]
    resources:
        mem_mb=needs("tiles", "mem_mb"),
        runtime=needs("tiles", "minutes"),
    params:
        slide=slide_path,
        out=out_folder,
        options=slide_options(with_encoders=True),
    shell:
        "pathopipe tiles --out {params.out:q} --slide-id={wildcards.slide_id:q} {params.options}"
        " --threads {threads} --after {input.before:q} --receipt {output:q} -- {params.slide:q} > {log:q} 2>&1"

"""The objects of a slide. They need its tissue only, but two jobs of a slide never look for that at once."""


rule segment:
    input:
        before=f"{DONE}/{'embed' if config['encoders'] and not config['split'] else 'tissue'}/{{slide_id}}.json",
        plan=ancient(PLAN),
    output:
        f"{DONE}/segment/{{slide_id}}.json",
    log:
        f"{LOGS}/segment/{{slide_id}}.log",
    retries: config["retries"]
    group:
        "slide"
    threads: config["threads"]
    resources:
        mem_mb=needs("segment", "mem_mb"),
        runtime=needs("segment", "minutes"),
    params:
        slide=slide_path,
        out=out_folder,
        options=slide_options(),
        layers=",".join(config["segment"]),
    shell:
        "pathopipe segment --out {params.out:q} --slide-id={wildcards.slide_id:q} {params.options}"
        " --tasks {params.layers:q} --threads {threads} --after {input.before:q} --receipt {output:q}"
        " -- {params.slide:q} > {log:q} 2>&1"

//! Scripts without files. The suite has whole guests.

use super::grub_titles;

#[test]
fn what_the_menu_holds() {
    let script = r#"
        # comment
        if [ x"${feature_menuentry_id}" = xy ]; then
          menuentry_id_option="--id"
        else
          menuentry_id_option=""
        fi
        export menuentry_id_option
        function one { menuentry "from $1" { true; } }
        for n in a b 'c d'; do one $n; done
        menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple' {
            echo 'x'
        }
        submenu "Advanced ${unset}options" { menuentry inner { } ; submenu deeper { menuentry innermost { true } } }
        if [ "$grub_platform" = efi ]; then menuentry never { }; elif [ -n "$nothing" ]; then menuentry never { }
        else menuentry "else" { }; fi
        set n=0; while [ $n -lt 3 ]; do menuentry "turn $n"\
          { true; }; if [ $n = 1 ]; then set n=5; else set n=1; fi; done"#;
    let expected = [
        "from a",
        "from b",
        "from c",
        "Debian GNU/Linux",
        "Advanced options",
        "inner",
        "deeper",
        "innermost",
        "else",
        "turn 0",
        "turn 1",
    ];
    assert_eq!(grub_titles(script), expected);
}

#[test]
fn scripts_that_are_wrong_or_never_end() {
    for bad in [
        "if",
        "if true; then",
        "menuentry",
        "menuentry x {",
        "}",
        "fi",
        "for x in; do",
        "function",
        "{",
        "\"",
        "'",
        "$",
        "${",
    ] {
        assert!(grub_titles(bad).is_empty(), "{bad}");
    }
    for endless in [
        "while true; do set a=\"$a$a x\"; done",
        "until false; do true; done",
        "function f { f; f; }; f",
        "function f { menuentry x { f; }; f; }; f",
        "while true; do menuentry x { while true; do true; done; }; done",
        "set a=x; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do set a=\"$a$a $a\"; done; for j in $a; do for k in $a; do for l in $a; do true; done; done; done",
    ] {
        let _ = grub_titles(endless);
    }
    let _ = grub_titles(&format!(
        "set a={}; for i in 1 2 3; do set b=\"{}\"; done",
        "x".repeat(60_000),
        "$a".repeat(500_000)
    ));
    let _ = grub_titles(&format!(
        "set a={}; while true; do menuentry $a {{ linux /k $a; }}; set b$n=$a; n=1$n; done",
        "x".repeat(60_000)
    ));
    let _ = grub_titles(&"if true; then ".repeat(100_000));
    let _ = grub_titles(&"submenu x { ".repeat(100_000));
    let _ = grub_titles(&"! ".repeat(100_000));
    let _ = grub_titles(&"{ ".repeat(100_000));
}

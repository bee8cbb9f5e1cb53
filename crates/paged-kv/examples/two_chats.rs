//! Two chats with one system prompt, one of them answered twice: what is shared, what is copied,
//! what is left in the cache. `cargo run -p paged-kv --example two_chats`

use std::error::Error;

use paged_kv::{BlockManager, BlockSize, BlockState, Config, KvAllocator, Salt};

fn draw(kv: &BlockManager, what: &str) {
    let map: String = kv
        .block_map()
        .map(|(_, state)| match state {
            BlockState::Free => '·',
            BlockState::Cached => '○',
            BlockState::Referenced { readers: 1, .. } => '●',
            BlockState::Referenced { .. } => '◆',
        })
        .collect();
    println!("{map}  {what}");
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut kv = BlockManager::new(Config::new(25, BlockSize::new(4)?))?;
    println!("· free   ○ cached   ● one reader   ◆ shared\n");
    draw(&kv, "24 blocks of 4 tokens");

    // The first chat: nothing is cached, so the model computes all 14 tokens.
    let system: Vec<u32> = (100..110).collect();
    let first: Vec<u32> = system.iter().copied().chain([1, 2, 3, 4]).collect();
    let chat = kv.allocate(&first, Salt::NONE, true, first.len());
    let mut chat = chat.ok_or("the first chat does not fit")?;
    kv.publish(&mut chat.table, &first, first.len());
    draw(&kv, "first chat: 14 tokens, 3 full blocks published");

    // The second one finds the two blocks that hold nothing but the system prompt.
    let second: Vec<u32> = system.iter().copied().chain([7, 8, 9]).collect();
    let other = kv.allocate(&second, Salt::NONE, true, second.len());
    let other = other.ok_or("the second chat does not fit")?;
    draw(
        &kv,
        &format!("second chat: {} of 13 tokens cached", other.num_cached),
    );

    // A second answer to the first chat shares everything, down to the block that is half full.
    let mut answer = kv.fork(&mut chat.table, first.len());
    draw(&kv, "fork of the first chat");

    // Whoever writes first into the half-full block gets a copy of it.
    let mut copies = Vec::new();
    let grown = kv.extend(&mut answer, first.len(), first.len() + 1, &mut copies);
    grown.ok_or("no block for the copy")?;
    let (src, dst) = (copies[0].src, copies[0].dst);
    draw(
        &kv,
        &format!("the fork writes: copy block {src} to block {dst}"),
    );

    // Freed blocks stay findable until their room is needed.
    kv.free(answer);
    kv.free(chat.table);
    kv.free(other.table);
    let again = kv.match_prefix(&first, Salt::NONE);
    draw(
        &kv,
        &format!("all freed: {again} of 14 tokens of the first chat would hit"),
    );
    Ok(())
}
